"""`snakemake --lint`, but for one of its wishes: `python workflow/lint.py`.

It wants a conda environment or a container for every rule. The environment is `.venv`, from `requirements.lock`.
"""

import subprocess
import sys
from pathlib import Path

NOT_WANTED = "    * Specify a conda environment or container for each rule.:"

command = [str(Path(sys.executable).with_name("snakemake")), "--lint"]
process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
found = [line for line in process.stdout.splitlines() if line.startswith("    * ")]
if process.returncode and (not found or set(found) != {NOT_WANTED}):
    sys.exit(process.stdout)
