"""Rows are prepared by several threads, which parquet's reader would not survive by itself."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

READ_AT_ONCE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from restitch.modeling.data.arrow_tables import ArrowTable
file = Path(sys.argv[1])
for _ in range(30):
    table = ArrowTable(file.parent, [file])
    def read(index):
        return table.column("label")[index], table.row(index, ("text", "label"))[1]
    with ThreadPoolExecutor(8) as pool:
        for label, again in pool.map(read, range(0, len(table), 7)):
            assert label == again
"""


def test_threads_may_read_columns_and_rows_of_one_file_at_once(tmp_path: Path) -> None:
    rows = 700
    texts = [str(n) * 200 for n in range(rows)]
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": texts, "label": list(range(rows))}), file, row_group_size=50)
    # In a process of its own: what goes wrong here is a segmentation fault.
    done = subprocess.run(
        [sys.executable, "-c", READ_AT_ONCE, str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
