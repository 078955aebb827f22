"""The studies of the papers, one file each; `flow` runs one and stores its results.

The command line imports this list and `flow` only.
"""

STUDIES = {
    "density": "accuracy against the density of the masks (Localize-and-Stitch, Fig. 6)",
    "shots": "accuracy against the rows per class used to localize (Localize-and-Stitch, Fig. 7)",
    "continual": "accuracy and seconds as members join one by one (Localize-and-Stitch, Fig. 9)",
    "subsets": "accuracy of similar and of dissimilar tasks (Localize-and-Stitch, Table 6)",
    "runtime": "seconds to localize and to merge (Localize-and-Stitch, Tables 10 and 11)",
    "agreement": "catastrophic, selfish, general and universal weights (TALL-masks, Eq. 7)",
    "threshold": "accuracy against the tasks that must agree in Consensus (TALL-masks, Fig. 6)",
    "tasks": "normalized accuracy against the number of tasks (TALL-masks, Fig. 5)",
}
