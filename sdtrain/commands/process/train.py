"""sdtrain, as one of its processes starts another: nothing is searched before Python's own modules
and those that are installed, neither this folder nor the working directory.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.append(str(folder.parents[2]))  # a checkout that is not installed is found there
    from sdtrain.commands.train import main

    main()
