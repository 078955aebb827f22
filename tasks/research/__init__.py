"""Steps of comparisons and studies: tuning, density curves, specialists, agreement.

`flows.research`, reports and repair import it; no other step does.
"""
