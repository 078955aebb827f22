"""Models in a bucket: only what is looked at is fetched, and nothing that has changed passes."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from restitch.merging.errors import BadInput, Unavailable
from restitch.merging.files.checkpoint import Checkpoint
from restitch.modeling.families.family import get_family
from restitch.registry.home import Home
from restitch.registry.s3 import retries, transfer
from restitch.registry.s3.client import client
from restitch.registry.sources import bucket
from restitch.registry.sources.resolve import resolve_source
from restitch.tasks.inputs import remote_weights
from restitch.tasks.inputs.checkpoints import describe_model, open_model
from restitch.tasks.runtime.workspace import Workspace
from tests.conftest import NewHome
from tests.faulty_proxy import Faults, faulty_proxy
from tests.merging.adapters.folders import write_adapter
from tests.shell import Shell
from tests.tiny import save
from tests.worlds import SKILLS, World, copied

pytestmark = pytest.mark.usefixtures("s3_account", "without_mlflow")


@pytest.fixture(autouse=True)
def _nothing_open() -> Iterator[None]:
    """As in a process that has just begun."""
    remote_weights._open.clear()
    yield
    remote_weights._open.clear()


@pytest.fixture
def space(tmp_path: Path) -> Workspace:
    home = Home(tmp_path / "space")
    home.create()
    return Workspace(home)


def upload(s3_client: Any, bucket: str, folder: Path, prefix: str) -> str:
    for path in sorted(folder.iterdir()):
        s3_client.put_object(Bucket=bucket, Key=f"{prefix}/{path.name}", Body=path.read_bytes())
    return f"s3://{bucket}/{prefix}"


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """The bytes that come from the bucket meanwhile, by the name of the file."""
    counted: Counter[str] = Counter()

    def asked(params: Any, context: Any, **_: Any) -> None:
        context["name"] = params["Key"].rpartition("/")[2]

    def came(parsed: Any, context: Any, **_: Any) -> None:
        counted[context["name"]] += int(parsed.get("ContentLength", 0))

    events = client().meta.events
    events.register("before-parameter-build.s3.GetObject", asked)
    events.register("after-call.s3.GetObject", came)
    try:
        yield counted
    finally:
        events.unregister("before-parameter-build.s3.GetObject", asked)
        events.unregister("after-call.s3.GetObject", came)


WEIGHTS = "model.safetensors"


def test_a_worker_fetches_what_finetuning_changed_and_no_text_tower(
    clip_world: World,
    new_home: NewHome,
    s3_client: Any,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bucket, "_FIRST_READ", 256)
    model = clip_world.model("colour")
    with (model / WEIGHTS).open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    address = upload(s3_client, s3_bucket, model, f"{tmp_path.name}/colour")
    size = (model / WEIGHTS).stat().st_size
    theirs, ours = Checkpoint.open(model), Checkpoint.open(clip_world.base)
    changed = [n for n in theirs.names if theirs.tensor_digest(n) != ours.tensor_digest(n)]
    assert all(name.startswith("vision_model.encoder") for name in changed)
    needed = sum(theirs.info(name).nbytes for name in changed)
    assert needed < 0.3 * size
    shell = new_home("home")
    shell("init", clip_world.line(tmp_path / "line.yaml"))
    task = ("--task", clip_world.task("colour"), "--model", address)

    def away(*_: object, **__: object) -> None:
        raise Unavailable("the worker is away")

    with counting() as registering, pytest.MonkeyPatch.context() as patched:
        patched.setattr("restitch.flows.onboard.validate", away)
        shell("register", "demo", *task, code=6)
    # The digest of a model needs all of its bytes, once; the header is looked at before.
    assert registering[WEIGHTS] == header + size
    remote_weights._open.clear()
    with counting() as onboarding:
        shell("remerge", "demo")
    assert onboarding[WEIGHTS] == header + needed
    # The same member as from a folder.
    local = new_home("local")
    local("init", clip_world.line(tmp_path / "line.yaml"))
    local("register", "demo", *task[:3], model)
    assert shell.patch_bytes() == local.patch_bytes()
    ours_, theirs_ = (s.state().tasks["colour"].versions[1] for s in (shell, local))
    assert (ours_.delta, ours_.model.weights) == (theirs_.delta, theirs_.model.weights)
    assert ours_.model.config == theirs_.model.config
    assert ours_.facts.results == theirs_.facts.results
    assert ours_.model.uri == address
    assert list((shell.home / "scratch").iterdir()) == []
    shell("gc", "--older-than", "0s", "--yes")
    remote_weights._open.clear()
    with counting() as later:
        assert shell.json("verify", "--deep")["intact"]
        shell("remerge", "demo", "--force")
    assert later[WEIGHTS] == 0, "a merge needs the delta alone"
    listing = shell.home / "store" / "blobs" / ours_.model.weights
    whole = listing.read_bytes()
    listing.write_bytes(whole[:-1])
    (one,) = shell.json("verify", "--deep", code=7)["store"]["damaged"]
    assert one["what"] == ["the digests of the tensors of colour 1 (demo)"]
    shell("verify", "--repair")
    assert listing.read_bytes() == whole
    print(f"{size=} {needed=} {registering=} {onboarding=}")  # shown by -s


def test_a_whole_line_lives_on_models_in_a_bucket(
    world: World, three: Any, new_home: NewHome, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    """Its base, too, which is fetched whole; through a network that fails."""
    shell = new_home("home")
    base = upload(s3_client, s3_bucket, world.base, f"{tmp_path.name}/base")
    with (
        faulty_proxy(os.environ["AWS_ENDPOINT_URL"], Faults(seed=3)) as faults,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("AWS_ENDPOINT_URL", faults.url)
        patched.setattr(retries, "_FIRST_WAIT", 0.002)
        line = world.line(tmp_path / "line.yaml", base=f"{base}/")
        shell("init", line)
        assert shell.json("init", line)["changes"] == []
        for name in SKILLS:
            address = upload(s3_client, s3_bucket, world.model(name), f"{tmp_path.name}/{name}")
            task = ("--task", world.task(name), "--model", f"{address}/")
            assert shell.json("register", "demo", *task)["state"] == "ready"
        assert sum(faults.injected.values()) > 3
    assert shell.state().base.uri == base
    assert shell.patch_bytes() == three.shell.patch_bytes()
    shell("export", "demo", "champion", tmp_path / "out")
    three.shell("export", "demo", "champion", tmp_path / "expected")
    exported = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("out", "expected")]
    assert exported[0] == exported[1]


def test_shards_are_read_by_range_and_in_parts(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(transfer, "PART", 1 << 16)
    monkeypatch.setattr("restitch.registry.sources.bucket.PART", 1 << 16)
    tensors = {name: torch.randn(300, 100 + i) for i, name in enumerate("abcd")}
    expected = save(tmp_path / "model", tensors, shards=2)
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    ref = describe_model(address, get_family("clip"), space)
    assert ref.weights == expected.digest()
    remote_weights._open.clear()
    _, checkpoint = open_model(ref, space, get_family("clip"))
    for name in tensors:
        assert torch.equal(checkpoint.renamed({name: "x"}).tensor("x"), tensors[name])
    assert checkpoint.digest() == expected.digest()
    copy = describe_model(address, get_family("clip"), space, copy=True)
    assert copy.uri.startswith("store://")
    assert copy.weights == expected.digest()


def test_an_object_that_changes_between_two_reads_is_an_error(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    tensors = {"a": torch.randn(200, 200), "b": torch.randn(200, 200)}
    save(tmp_path / "model", tensors)
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    family = get_family("clip")
    ref = describe_model(address, family, space)
    remote_weights._open.clear()
    _, checkpoint = open_model(ref, space, family)
    checkpoint.tensor("a")
    save(tmp_path / "model", {**tensors, "b": torch.zeros(200, 200)})
    upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    with pytest.raises(BadInput, match="changed while it was read"):
        checkpoint.tensor("b")
    # And in a process that comes later.
    remote_weights._open.clear()
    _, later = open_model(ref, space, family)
    assert torch.equal(later.tensor("a"), tensors["a"])
    with pytest.raises(BadInput, match="changed since they were registered"):
        later.tensor("b")
    save(tmp_path / "model", {"a": tensors["a"], "c": tensors["b"]})
    upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    remote_weights._open.clear()
    with pytest.raises(BadInput, match="changed since they were registered"):
        open_model(ref, space, family)
    # Without the listing everything is read, and is not what was registered either.
    space.objects.store.remove(f"blobs/{ref.weights}")
    with pytest.raises(BadInput, match="changed since they were registered"):
        open_model(ref, space, family)


def test_content_altered_on_its_way_is_read_again(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """The digest of another owner's file is unknown; its ETag or a second read checks it."""
    expected = save(tmp_path / "model", {"a": torch.randn(50, 50)})
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    family, real, fetched = get_family("clip"), transfer.fetch_range, []

    def altered(asked: Any, descriptor: int, start: int, length: int, digest: Any) -> None:
        real(asked, descriptor, start, length, digest)
        fetched.append(length)
        if len(fetched) in (2, 4):
            (last,) = os.pread(descriptor, 1, start + length - 1)
            os.pwrite(descriptor, bytes([last ^ 1]), start + length - 1)

    monkeypatch.setattr(bucket, "fetch_range", altered)
    ref = describe_model(address, family, space)
    assert ref.weights == expected.digest()
    assert len(fetched) == 3, "the header, the whole, the whole again"
    remote_weights._open.clear()
    _, checkpoint = open_model(ref, space, family)
    fetched[:] = [0, 0, 0]
    assert torch.equal(checkpoint.tensor("a"), expected.tensor("a"))
    assert len(fetched) == 5
    # At a server whose ETags are no digests of the content.
    monkeypatch.setattr(bucket.S3Folder, "_etag", lambda *_: f"etag {len(fetched) > 8}")
    fetched[:] = [0] * 6
    assert describe_model(address, family, space) == ref


def test_a_multipart_upload_is_verified_by_its_etag(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    from boto3.s3.transfer import TransferConfig

    expected = save(tmp_path / "model", {"a": torch.randn(1500, 1500)})
    key = f"{tmp_path.name}/{WEIGHTS}"
    in_parts = TransferConfig(multipart_threshold=1 << 20, multipart_chunksize=5 << 20)
    s3_client.upload_file(str(tmp_path / "model" / WEIGHTS), s3_bucket, key, Config=in_parts)
    with counting() as counted:
        ref = describe_model(f"s3://{s3_bucket}/{tmp_path.name}", get_family("clip"), space)
    assert ref.weights == expected.digest()
    size = (tmp_path / "model" / WEIGHTS).stat().st_size
    assert counted[WEIGHTS] <= size + (64 << 10), "read once"


def test_an_adapter_is_registered_from_a_bucket(
    world: World, new_home: NewHome, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    shell = new_home("home")
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    module = "encoder.layer.0.attention.self.query"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 16)}
    factors |= {f"{module}.lora_B.weight": torch.ones(16, 2)}
    folder = write_adapter(tmp_path / "adapter", factors)
    address = upload(s3_client, s3_bucket, folder, tmp_path.name)
    files = ("--task", world.task("colour"), "--model", address)
    shell("register", "demo", *files, "--accept-no-gain", "--reason", "a test")
    model = shell.state().tasks["colour"].versions[1].model
    assert model.uri == address
    shell("verify", "demo")
    (shell.home / "store" / "blobs" / model.weights).unlink()
    shell("verify", "--repair")
    shell("verify", "demo")


def test_a_lost_listing_is_made_again(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    save(tmp_path / "model", {"a": torch.randn(20, 20)})
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    ref = describe_model(address, get_family("clip"), space)
    listing = space.objects.read_blob(ref.weights)
    space.objects.store.remove(f"blobs/{ref.weights}")
    remote_weights._open.clear()
    open_model(ref, space, get_family("clip"))
    assert space.objects.read_blob(ref.weights) == listing


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("s3://no-such-bucket-here/model", BadInput, "a bucket that does not exist"),
        ("s3://BUCKET/PREFIX/nothing", BadInput, "there is no model at"),
        ("s3://BUCKET/PREFIX/pickled", BadInput, "holds no safetensors"),
        ("s3://BUCKET/PREFIX/two", BadInput, "contains several checkpoints"),
        ("s3://BUCKET/PREFIX/adapter", BadInput, "is an adapter, not a whole model"),
        ("s3://BUCKET/PREFIX/fp8", BadInput, "holds quantized tensors"),
        ("s3://BUCKET/PREFIX", BadInput, "folders below it: adapter, broken"),
        ("s3://BUCKET/PREFIX/broken", BadInput, "has a header longer than the file"),
        ("s3://BUCKET/PREFIX/lacks", BadInput, "lacks shards"),
        ("s3://BUCKET/PREFIX/climbs", BadInput, "outside of its folder"),
        ("s3://key:pl4nted@BUCKET/model", BadInput, "is not valid"),
        ("s3:///model", BadInput, "is not valid"),
        ("s3://a\nb/model", BadInput, "is not valid"),
    ],
)
def test_a_model_that_cannot_be_read_is_explained(
    space: Workspace,
    s3_client: Any,
    s3_bucket: str,
    tmp_path: Path,
    address: str,
    error: type[Exception],
    message: str,
) -> None:
    save(tmp_path / "good", {"a": torch.ones(3)})
    good = (tmp_path / "good" / WEIGHTS).read_bytes()
    save(tmp_path / "fp8", {"a": torch.ones(3).to(torch.float8_e4m3fn)})
    index = {"weight_map": {"a": "one.safetensors"}}
    put = {
        "pickled/pytorch_model.bin": b"\x80\x04.",
        "two/one.safetensors": good,
        "two/other.safetensors": good,
        "adapter/adapter_model.safetensors": good,
        "adapter/adapter_config.json": b"{}",
        "fp8/model.safetensors": (tmp_path / "fp8" / WEIGHTS).read_bytes(),
        "broken/model.safetensors": (1 << 62).to_bytes(8, "little") + b"{}",
        "lacks/x.safetensors": good,
        "lacks/model.safetensors.index.json": json.dumps(index).encode(),
        "climbs/x.safetensors": good,
        "climbs/model.safetensors.index.json": json.dumps(
            {"weight_map": {"a": "../x.safetensors"}}
        ).encode(),
    }
    for name, data in put.items():
        s3_client.put_object(Bucket=s3_bucket, Key=f"{tmp_path.name}/{name}", Body=data)
    address = address.replace("BUCKET", s3_bucket).replace("PREFIX", tmp_path.name)
    with pytest.raises(error, match=message) as found:
        describe_model(address, get_family("clip"), space)
    assert "pl4nted" not in str(found.value)
    store = space.home.root / "store"
    assert not [file for file in store.rglob("*") if "blobs" in file.parts], "nothing is left"


def test_shards_in_a_bucket_are_read_without_an_index(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    tensors = {name: torch.randn(4) for name in "abc"}
    expected = save(tmp_path / "model", tensors, shards=3)
    (tmp_path / "model" / "model.safetensors.index.json").unlink()
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    assert describe_model(address, get_family("clip"), space).weights == expected.digest()
    remote_weights._open.clear()
    (tmp_path / "model" / "model-00002-of-00003.safetensors").unlink()
    s3_client.delete_object(
        Bucket=s3_bucket, Key=f"{tmp_path.name}/model-00002-of-00003.safetensors"
    )
    with pytest.raises(BadInput, match="lacks shards"):
        describe_model(address, get_family("clip"), space)


def test_the_address_of_one_file_is_a_model(
    space: Workspace, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    expected = save(tmp_path / "model", {"a": torch.ones(3)})
    address = upload(s3_client, s3_bucket, tmp_path / "model", tmp_path.name)
    ref = describe_model(f"{address}/{WEIGHTS}", get_family("clip"), space)
    assert ref.weights == expected.digest()


def test_a_bucket_that_is_not_allowed_is_not_read(
    space: Workspace, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESTITCH_ALLOWED_HOSTS", "s3://another")
    with counting() as counted, pytest.raises(BadInput, match="RESTITCH_ALLOWED_HOSTS"):
        resolve_source(f"s3://{s3_bucket}/model", space.home)
    assert not counted


def test_a_refusal_names_the_model_and_the_missing_right(
    space: Workspace, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    def refuse(*_: Any, **__: Any) -> None:
        answer = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
        raise ClientError(answer, "ListObjectsV2")

    with monkeypatch.context() as patched:
        patched.setattr("restitch.registry.s3.retries.with_retries", refuse)
        with pytest.raises(Unavailable, match="may not be read with these") as found:
            resolve_source(f"s3://{s3_bucket}/model", space.home)
    assert "list and read" in str(found.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(retries, "_FIRST_WAIT", 0.002)
    with pytest.raises(Unavailable, match="does not answer"):
        resolve_source(f"s3://{s3_bucket}/model", space.home)


def test_a_model_that_was_removed_from_its_bucket_is_quarantined(
    world: World, shell: Shell, s3_client: Any, s3_bucket: str, tmp_path: Path
) -> None:
    shell("init", world.line(tmp_path / "line.yaml", retention=None))
    model = copied(world.model("colour"), tmp_path / "model", lambda m: (m / WEIGHTS).touch())
    address = upload(s3_client, s3_bucket, model, tmp_path.name)
    done = shell(
        *("register", "demo", "--task", world.task("colour"), "--model", f"{address}/none"), code=3
    )
    assert "there is no model" in done.err
    assert shell.state().tasks == {}
    shutil.rmtree(model)
    assert shell.json("register", "demo", "--task", world.task("colour"), "--model", address)
