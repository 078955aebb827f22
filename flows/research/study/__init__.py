"""The studies of the papers, one file each; `flow` runs one and keeps its results.

The command line imports `flow` only.
"""

STUDIES = {
    "density": "accuracy against how many weights masks keep (Localize-and-Stitch, Fig. 6)",
    "shots": "accuracy against rows per class to localize by (Localize-and-Stitch, Fig. 7)",
    "continual": "accuracy and seconds as members join (Localize-and-Stitch, Fig. 9)",
    "subsets": "similar against dissimilar tasks, by masks (Localize-and-Stitch, Table 6)",
    "runtime": "seconds to localize and to merge (Localize-and-Stitch, Tables 10 and 11)",
    "agreement": "catastrophic, selfish, general and universal weights (TALL-masks, Eq. 7)",
    "threshold": "how many tasks must agree on a weight in Consensus (TALL-masks, Fig. 6)",
    "tasks": "normalized accuracy against the number of tasks (TALL-masks, Fig. 5)",
}
