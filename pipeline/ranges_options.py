"""Options of `deltawatch ranges ...`."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

_ACTIONS = {
    "show": "say what is in ranges",
    "accept": "let conversations of an archive count as normal",
    "revoke": "take back what was accepted",
    "freeze": "let ranges stay as they are",
    "thaw": "let frozen ranges learn again",
    "rollback": "forget what ranges learnt after a day",
    "merge": "make one snapshot of several ranges",
}
_FOLDER = "a ranges snapshot, or the --state of a job"


def add(parser: argparse.ArgumentParser) -> None:
    """Give the `ranges` parser its actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {
        name: actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        for name, text in _ACTIONS.items()
    }
    for name, action in made.items():
        several = "+" if name == "merge" else None
        action.add_argument("ranges", type=Path, nargs=several, metavar="RANGES", help=_FOLDER)
        archived = "; else the name in the archive" if name == "accept" else ""
        action.add_argument("--model", help=f"of a state with several{archived}")
        if name != "show":
            action.add_argument("--why", required=True, help="the reason, for who reads it later")
            action.add_argument("--who", help="does it (this user)")
    for name in ("accept", "merge"):
        made[name].add_argument(
            "--out", type=Path, metavar="DIR", help="folder of the new snapshot"
        )
    _show_options(made["show"])
    _accept_options(made["accept"])
    made["revoke"].add_argument("id", metavar="ID", help="of the accept, as `ranges show` has it")
    made["rollback"].add_argument(
        "--to", type=_moment, required=True, metavar="DATE", help="last day that is kept (UTC)"
    )


def _show_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directions", type=Path, metavar="DIR", help="to name directions")
    parser.add_argument("--top", type=int, default=20, help="series shown (20)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them, .png or .svg")


def _accept_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--archive", type=Path, required=True, metavar="DIR", help="where they are archived"
    )
    parser.add_argument(
        "--alert", nargs="+", default=[], metavar="ID", help="ids of alerts, or conversations"
    )
    parser.add_argument("--ids", type=Path, metavar="FILE", help="with such ids, one a line")
    parser.add_argument("--since", type=_moment, metavar="TIME", help="flagged from then on (UTC)")
    parser.add_argument("--until", type=_moment, metavar="TIME", help="flagged before then (UTC)")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time; write 2026-11-26 or 2026-11-26T10:30"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
