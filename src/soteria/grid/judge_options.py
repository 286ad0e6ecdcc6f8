"""How a grid's judge is asked, as its grid file says under `judge_options`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from soteria.cli import MOST, MOST_TEMPERATURE
from soteria.grid.values import no_truth_values
from soteria.judging.formats import FORMATS
from soteria.judging.presets import PRESETS, JudgeSettings, make_settings


class JudgeOptions(BaseModel):
    """The options of judge.py that begin with --judge, and --harmful_labels. `prompt` and `system` are text files."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    _no_truth_values = model_validator(mode="before")(no_truth_values)

    preset: Literal[tuple(PRESETS)] | None = None
    format: Literal[tuple(FORMATS)] | None = None
    prompt: Path | None = None
    system: Path | None = None
    max_tokens: int | None = Field(default=None, gt=0, le=MOST)
    temperature: Annotated[float, Field(ge=0, le=MOST_TEMPERATURE)] | Literal["own"] = 0.0
    harmful_labels: tuple[str, ...] = ()

    @property
    def settings(self) -> JudgeSettings:
        """Raises UserError for a file that cannot be read."""
        given = {name: getattr(self, name) for name in self.model_fields_set - {"harmful_labels"}}
        if given.get("temperature") == "own":
            given["temperature"] = None
        return make_settings(**given)
