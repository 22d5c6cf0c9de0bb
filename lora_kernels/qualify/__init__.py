"""`python -m lora_kernels.qualify`: this machine's GPU vouches for its own kernels.

`checks.py` lists what is tried, `child.py` tries it in a process of its own, `parent.py` leads
children through it and survives them, `timing.py` measures, `record.py` keeps the verdicts, and
`choose.py` is how "auto" obeys them.
"""
