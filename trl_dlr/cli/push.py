# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""`trl-dlr push`: push a saved policy to the Hub."""

from dataclasses import dataclass, field

from .parser import command_parser
from .reasoner import ReasonerArguments


EPILOG = """example:
  trl-dlr push --policy outputs/demo --repo_id user/policy --private true

Log in with `hf auth login`, or set HF_TOKEN, with a token that may write."""


@dataclass
class PushArguments(ReasonerArguments):
    """
    Arguments of `trl-dlr push`. The main model is loaded, so that a policy is not pushed without one that it works with.

    Args:
        repo_id (`str`, *optional*):
            Repository to push to, which is created if it is not there.
        revision (`str`, *optional*):
            Branch to push to.
        private (`bool`, *optional*):
            Whether a new repository is private.
        commit_message (`str`, *optional*, defaults to `"Upload policy"`):
            Message of the commit.
    """

    repo_id: str | None = field(
        default=None, metadata={"help": "Repository to push to, such as user/policy; must be set."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    commit_message: str = field(default="Upload policy", metadata={"help": "Message of the commit."})

    def __post_init__(self):
        super().__post_init__()
        if self.repo_id is None:
            raise ValueError("`repo_id` must be set: pass --repo_id user/policy.")


def main(args: PushArguments) -> None:
    commit = args.load().push_to_hub(
        args.repo_id, revision=args.revision, private=args.private, commit_message=args.commit_message
    )
    print(f"Pushed to {commit}")


def run(argv: list[str], prog: str) -> None:
    parser = command_parser((PushArguments,), prog, __doc__, EPILOG)
    main(*parser.parse_args_and_config(argv))
