"""``qzoo publish``: upload to the Hub."""

from __future__ import annotations

import argparse

from qzoo.commands import Add, say
from qzoo.commands.arguments import own_folder
from qzoo.errors import one_line


def register(add: Add) -> None:
    """Declare the command."""
    sub = add("publish", _run, "Upload a checkpoint to the Hub: weights, ONNX, card; in one commit.")
    sub.add_argument("folder", metavar="FOLDER", help="of a checkpoint, or its name in the store")
    sub.add_argument(
        "--to", metavar="ORG/NAME", help="default: the checkpoint's name in $QZOO_HUB_ORG or qzoo"
    )
    sub.add_argument("--private", action="store_true")
    sub.add_argument("--revision", default="main", help="branch (default: main)")
    sub.add_argument("--dry-run", action="store_true", help="everything but the upload")


def _run(args: argparse.Namespace) -> int:
    from qzoo.release.publish import publish

    done = publish(
        own_folder(args.folder),
        args.to,
        private=args.private,
        revision=args.revision,
        dry_run=args.dry_run,
    )
    for path, size in done.files.items():
        say(f"{size:12,}  {one_line(path)}")
    say(
        f"{done.repo}: {'dry run, nothing sent' if args.dry_run else f'commit {done.commit}, tag {done.tag}'}"
    )
    return 0
