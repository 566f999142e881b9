"""The command sdtrain as a script, for processes that are started by another sdtrain process.

Neither this folder nor the working directory comes before the standard library and the installed
packages in the search path.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.append(str(folder.parents[2]))  # for a checkout that is not installed
    from sdtrain.commands.train import main

    main()
