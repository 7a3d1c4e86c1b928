# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""
Push a saved policy to the Hub: policy, tokenizer, value head and card, without checkpoints, pages and logs. Its main
model is not loaded.

Examples:

    trl-dlr push --policy outputs/demo --repo_id user/policy --private true

Log in with `hf auth login`, or set HF_TOKEN, with a token that may write.
"""

from dataclasses import dataclass

from ..models.hub import find_file
from ..models.thinking import THINKING_FILE
from ..option_docs import described
from ..reasoners import LatentReasoner, ThinkingReasoner


@described
@dataclass
class PushArguments:
    """
    Arguments of `trl-dlr push`.

    Args:
        policy (`str`, *optional*):
            Folder or Hub id of the policy, or of a model that thinks by itself.
        repo_id (`str`, *optional*):
            Repository to push to, which is created if it is not there.
        revision (`str`, *optional*):
            Branch to push to.
        private (`bool`, *optional*):
            Whether a new repository is private.
        commit_message (`str`, *optional*, defaults to `"Upload policy"`):
            Message of the commit.
    """

    policy: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    private: bool | None = None
    commit_message: str = "Upload policy"

    def __post_init__(self):
        if self.policy is None:
            raise ValueError("`policy` must be set: pass --policy with a Hub id or a folder.")
        if self.repo_id is None:
            raise ValueError("`repo_id` must be set: pass --repo_id user/policy.")


ARGUMENTS = (PushArguments,)


def main(args: PushArguments) -> None:
    thinks = find_file(args.policy, THINKING_FILE) is not None
    reasoner = (ThinkingReasoner.from_pretrained if thinks else LatentReasoner.without_main_model)(args.policy)
    commit = reasoner.push_to_hub(
        args.repo_id, revision=args.revision, private=args.private, commit_message=args.commit_message
    )
    print(f"Pushed to {commit}")
