"""`python -m lora_kernels.qualify`: this machine's GPU vouches for its own kernels.

`checks.py` lists what is tried, under the eyes of `guard.py`; `child.py` tries it in a process of
its own, `parent.py` leads children through it and survives them, `timing.py` measures, `record.py`
keeps the verdicts, `choose.py` is how "auto" obeys them and `ranks.py` how it does so alike on all
ranks.
"""
