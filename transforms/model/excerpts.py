"""Text around a token, for alerts of people who asked for text in them."""

from dataclasses import dataclass

from schemas.records import Int32s
from transforms.model.engine import Engine


@dataclass(frozen=True)
class Excerpts:
    """Decodes the tokens around a position.

    Attributes:
      engine: whose tokenizer decodes.
      reach: tokens shown on each side.
    """

    engine: Engine
    reach: int

    def __call__(self, token_ids: Int32s, at: int) -> str:
        """The text of tokens `at - reach` to `at + reach` of `token_ids` [tokens]."""
        start = max(at - self.reach, 0)
        window = token_ids[start : at + self.reach + 1].tolist()
        return str(self.engine.tokenizer().decode(window))
