"""The experiments of the paper that asked the question, as sweeps that can be interrupted.

D. Akhtiamov and M. Thomson, *Connectedness of loss landscapes via the lens of Morse theory*, PMLR
197 (2023). Run them with ``python -m examples.paper``; ``docs/paper.md`` tells what came of them.

A run is a frozen dataclass of settings; what it measures is one line of JSON beside them. `sweep`
carries out the runs that have no line yet, in processes side by side. Tables and figures are made
from the lines alone.
"""
