"""Run a module of this folder as a program, from any folder: `python launch.py bench quality ARGUMENTS`.

Python looks for modules where the program is that it was given: beside this file.
"""

import runpy
import sys

kind, name = sys.argv[1:3]
del sys.argv[1:3]
runpy.run_module(f"{kind}.{name}", run_name="__main__", alter_sys=True)
