"""One file per command of `minbert`: its options, and what it does with them. `minbert.launch.main` finds them; what
they share lies beside this folder.
"""
