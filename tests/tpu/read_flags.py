"""`python tests/tpu/read_flags.py` writes flags.json: the flags of the `gcloud` commands in use, by an installed SDK.

True stands for a flag that takes a value. The SDK keeps the table for the shell's completion.
"""

import json
import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "flags.json"

COMMANDS = [
    *(f"compute tpus queued-resources {name}" for name in ("create", "describe", "delete")),
    *(f"compute tpus tpu-vm {name}" for name in ("ssh", "describe")),
    *(f"storage {name}" for name in ("cp", "cat", "ls", "rm")),
]


def installed_sdk() -> Path | None:
    """Where the Google Cloud CLI lies, if it does."""
    gcloud = shutil.which("gcloud")
    root = Path(gcloud).resolve().parents[1] if gcloud else None
    return root if root and (root / "data" / "cli" / "gcloud_completions.py").is_file() else None


def read_flags(sdk: Path) -> dict[str, Any]:
    """`{"sdk": version, "commands": {command: {flag: takes a value}}}`; flags that all commands have are in each."""
    tree = runpy.run_path(str(sdk / "data" / "cli" / "gcloud_completions.py"))["STATIC_COMPLETION_CLI_TREE"]
    commands = {}
    for command in COMMANDS:
        node = tree
        for word in command.split():
            node = node["commands"][word]
        commands[command] = {flag: kind != "bool" for flag, kind in sorted({**tree["flags"], **node["flags"]}.items())}
        commands[command]["--no-user-output-enabled"] = False
    return {"sdk": (sdk / "VERSION").read_text(encoding="utf-8").strip(), "commands": commands}


if __name__ == "__main__":
    found = installed_sdk()
    if found is None:
        raise SystemExit("no Google Cloud CLI on PATH")
    TABLE.write_text(json.dumps(read_flags(found), indent=1) + "\n", encoding="utf-8")
    subprocess.run(["git", "diff", "--stat", str(TABLE)])
