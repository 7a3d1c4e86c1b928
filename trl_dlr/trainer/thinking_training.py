# Copyright 2026 The trl_dlr authors. Licensed under the Apache License, Version 2.0 (see LICENSE).

"""What all trainers of a language model that thinks by itself do alike."""

import os
from typing import Any

from transformers.trainer import TRAINING_ARGS_NAME

from ..models.thinking import Thinker, ThinkingConfig
from .checkpoints import WholeCheckpointsMixin, whole_files


class ThinkingTrainingMixin(WholeCheckpointsMixin):
    """
    For a TRL trainer of a causal LM that thinks as `self.thinker` lets it, or as `thinking_config` and `latent_type` say:
    checkpoints that are whole, and that say how the model thinks.
    """

    thinker: Thinker

    @property
    def thinking_config(self) -> ThinkingConfig | None:
        """How the model thinks now. `None` while it does not."""
        return self.thinker.config

    @property
    def latent_type(self) -> str:
        return self.thinker.config.latent_type

    def _checkpoint_record(self) -> dict[str, Any]:
        record = super()._checkpoint_record()
        record["policy"] = {"latent_type": self.latent_type, **record["policy"]}
        return record

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None):
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with whole_files(output_dir or self.args.output_dir) as folder:
            super()._save(folder, state_dict)
            os.remove(os.path.join(folder, TRAINING_ARGS_NAME))  # a pickle
            if self.thinking_config is not None:
                self.thinking_config.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging_dir is not None:  # what is pushed has its name
            return
        if self.args.should_save and self.thinking_config is not None:  # Trainer copies the files that it knows of
            self.thinking_config.save_pretrained(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)
