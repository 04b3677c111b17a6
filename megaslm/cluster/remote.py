"""What pdsh starts as a rank on every node: `python -m megaslm.cluster.remote WORD`, which becomes the script.

DeepSpeed's front end joins the words of a command by blanks for a shell on the node, after quoting some of them: one
word of letters and digits holds the environment and all arguments, and comes through any shell unchanged.
"""

import base64
import json
import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """WORD is made by commands.encode."""
    environment, arguments = json.loads(base64.urlsafe_b64decode(sys.argv[1]))
    os.environ.update(environment)
    for name, value in environment.items():
        if not value:
            del os.environ[name]
    os.execv(sys.executable, [sys.executable, "-u", *arguments])


if __name__ == "__main__":
    main()
