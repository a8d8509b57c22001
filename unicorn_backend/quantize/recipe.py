"""Recipes: which scheme each weight gets, by rules on module names.

A recipe is an ordered list of rules and the first one that fits decides. Rules are data, so a recipe
with overrides travels as JSON in the checkpoint and decides the same when it is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from unicorn_backend.errors import CheckpointError, OptionError
from unicorn_backend.layouts import SCHEMES

VERSION = 1
NONE = "none"
FLOAT = "float"
KINDS = ("any", "linear", "narrow", "embedding")
MORE_BITS = "layers with more bits"  # llama.cpp's choice: the first and the last eighth, and every third between
UNTIED = "models with a head of their own"


@dataclass(frozen=True)
class Rule:
    """`scheme` for modules of a kind whose dotted name contains the regular expression `pattern`.

    kind: "linear", "narrow" (a linear with fewer outputs than inputs), "embedding" or "any".
    scheme: one of `layouts.SCHEMES`, or "float" to leave the weight as it is; then `why` says why.
    only: MORE_BITS or UNTIED: decides nothing until `Recipe.fitted` knows the model.
    """

    kind: str
    pattern: str
    scheme: str
    why: str = ""
    only: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"rule kind: got {self.kind!r}, allowed are {', '.join(KINDS)}")
        if self.scheme not in (*SCHEMES, FLOAT):
            raise OptionError(f"scheme of rule {self.pattern!r}: got {self.scheme!r}, allowed are {_SCHEMES_TEXT}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise OptionError(f"rule {self.pattern!r} is not a regular expression: {error}") from error

    def fits(self, name: str, module: nn.Module) -> bool:
        """True if this rule decides about `module` called `name`."""
        return not self.only and _is_kind(self.kind, module) and _compiled(self.pattern).search(name) is not None

    def to_dict(self) -> dict[str, str]:
        """The arguments, without an empty `only`: a fitted recipe has none."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value or name != "only"}

    def fitted(self, layers: int, tied: bool) -> list[Rule]:
        """The rules that this one is for a model of that many layers, with or without a tied head."""
        if self.only == UNTIED:
            return [] if tied else [dataclasses.replace(self, only="")]
        if self.only == MORE_BITS:
            numbers = "|".join(str(i) for i in range(layers) if _has_more_bits(i, layers))
            return [dataclasses.replace(self, only="", pattern=rf"{_TO_LAYER}({numbers})(?=\.).*({self.pattern})")]
        return [self]


@dataclass(frozen=True)
class Recipe:
    """A named, ordered list of rules; the first that fits decides."""

    name: str
    rules: tuple[Rule, ...]

    @classmethod
    def named(cls, recipe: str | Recipe) -> Recipe:
        """The recipe of that name (`recipes()` lists them). Raises OptionError for an unknown one."""
        if isinstance(recipe, Recipe):
            return recipe
        if recipe not in _RULES:
            raise OptionError(f"recipe: got {recipe!r}, allowed are {', '.join(map(repr, recipes()))}")
        return cls(recipe, _RULES[recipe])

    def scheme_for(self, name: str, module: nn.Module) -> str | None:
        """Scheme of the weight of `module`, or None to leave it in its float type."""
        return self.decide(name, module)[0]

    def decide(self, name: str, module: nn.Module) -> tuple[str | None, str]:
        """(scheme, "") or (None, why the weight is left in its float type)."""
        for rule in self.rules:
            if rule.fits(name, module):
                if rule.scheme == FLOAT:
                    return None, rule.why or f"rule {rule.pattern!r}"
                return rule.scheme, ""
        return None, f"recipe {self.name!r} has no rule for it"

    def fitted(self, model: nn.Module) -> Recipe:
        """The recipe with what it leaves open decided for `model`: the numbers of layers, a tied head."""
        if not any(rule.only for rule in self.rules):
            return self
        names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
        text = [name for name in names if not _compiled(_OTHER_SENSES).search(name)]
        numbers = [int(found[1]) for name in text if (found := _LAYER.match(name))]
        layers, tied = 1 + max(numbers, default=0), _is_tied(model)
        return Recipe(self.name, tuple(new for rule in self.rules for new in rule.fitted(layers, tied)))

    def with_overrides(self, overrides: Mapping[str, str | None]) -> Recipe:
        """A recipe that asks `overrides` (regular expression -> scheme, None for float) first."""
        if not overrides:
            return self
        why = "left by the caller"
        first = tuple(Rule("any", pattern, scheme or FLOAT, why) for pattern, scheme in overrides.items())
        return Recipe(self.name, (*first, *self.rules))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; `from_dict` is the inverse."""
        return {"version": VERSION, "name": self.name, "rules": [rule.to_dict() for rule in self.rules]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`. Raises CheckpointError for a newer version or a damaged dict."""
        version = data.get("version")
        if not isinstance(version, int) or version < 1:
            raise CheckpointError(
                f"quantization recipe: got version {version!r}, expected 1 to {VERSION}; is config.json intact?"
            )
        if version > VERSION:
            raise CheckpointError(
                f"quantization recipe of version {version}; this unicorn_backend reads up to {VERSION}: "
                "upgrade it (pip install -U unicorn_backend)"
            )
        try:
            return cls(str(data["name"]), tuple(Rule(**rule) for rule in data["rules"]))
        except (KeyError, TypeError, OptionError) as error:
            raise CheckpointError(f"quantization recipe in config.json is damaged: {error}") from error


def recipes() -> tuple[str, ...]:
    """Names of the built-in recipes."""
    return tuple(_RULES)


def _is_kind(kind: str, module: nn.Module) -> bool:
    if kind == "any":
        return True
    if kind == "embedding":
        return isinstance(module, nn.Embedding)
    return isinstance(module, nn.Linear) and (kind == "linear" or module.out_features < module.in_features)


def _has_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits (src/llama-quant.cpp)."""
    first, last = layers // 8, 7 * layers // 8
    return layer < first or layer >= last or (layer - first) % 3 == 2


def _is_tied(model: nn.Module) -> bool:
    """True if the head reads the token table, also where the two are not tied yet (transformers, on meta)."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        return bool(config.get_text_config().tie_word_embeddings)
    users: dict[bool, set[int]] = {True: set(), False: set()}
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            tensor = module._buffers.get("weight_packed", module._parameters.get("weight"))
            users[isinstance(module, nn.Embedding)].add(id(tensor))
    return bool(users[True] & users[False])


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


_SCHEMES_TEXT = ", ".join((*SCHEMES, FLOAT))

# Up to the first component of a name that is a number, which is the layer.
_TO_LAYER = r"^(?:[^.]*[^.\d][^.]*\.)*"
_LAYER = re.compile(rf"{_TO_LAYER}(\d+)\.")

# Names of the modules of transformers 5 (Gemma 2 to 4, Llama, Qwen, Mistral, Phi, GPT-2 style).
_OTHER_SENSES = r"vision|visual|image|audio|multi_?modal|(^|\.)mm_"
_LEFT = (
    # Quantized vision towers cost OCR quality (optimum-intel issue 1241), and they run once per image.
    Rule("any", _OTHER_SENSES, FLOAT, "vision, audio and projectors stay float"),
    # A wrong expert is a wrong function; routers are below 0.1 % of the bytes.
    Rule("narrow", r"router|(^|\.)(\w+_)?gate$", FLOAT, "routers and gates stay float"),
    Rule("linear", r"(^|\.)altup\.", FLOAT, "mixing coefficients, read as a weight by their owner"),
    Rule("embedding", r"(^|[._])(wpe|pos|position|positions|positional)([._]|$)", FLOAT, "position tables stay float"),
)
_ATTENTION = r"attn|attention|(^|\.)([qkvo]|qkv|query|key|value|out)_?proj$|(^|\.)w[qkvo]$"
_FFN = r"mlp|ffn|feed_?forward|expert|(^|\.)(gate|up|down|gate_up|fc1|fc2|fc_in|fc_out|c_fc|w1|w2|w3)(_proj)?$"
_VALUE = r"(^|\.)(v|qkv|value|query_key_value)(_proj)?$|(^|\.)wv$"
_OUTPUT = r"(^|\.)(o|out)_proj$|(^|\.)wo$|attn\.c_proj$|attention\.dense$"
_FUSED = r"(^|\.)(qkv|qkv_proj|query_key_value|c_attn)$"
_DOWN = r"(^|\.)(down|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj)(_proj)?$"
_HEAD = r"(^|\.)(lm_head|embed_out|output)$"
_TABLE = Rule("embedding", "", "w8a")

_RULES: dict[str, tuple[Rule, ...]] = {
    "default": (
        *_LEFT,
        _TABLE,
        Rule("linear", _ATTENTION, "w8c"),
        Rule("linear", _FFN, "w4g32"),
        Rule("linear", "", "w8c"),
    ),
    "q4": (*_LEFT, _TABLE, Rule("linear", "", "w4g32")),
    # The embedded model's divergence, 1e-6: everything in w4g32 4231, in w4n32 3645, the table in q4k 3373.
    # With a vision tower in bf16 Gemma 3 27B would take 16.06 GB, with one of INT8 it takes 15.67.
    "ultra": (
        Rule("linear", _OTHER_SENSES, "w8g32"),
        *_LEFT,
        Rule("embedding", "", "q4k"),
        Rule("linear", "", "w4n32"),
    ),
    # Of the embedded model's divergence in w4n32, v_proj makes 22 % with 3 % of the weights, o_proj 19 % with 7 %
    # (down_proj 24 % with 27 %): in q5k the two cost 0.11 bits per weight.
    "hybrid": (*_LEFT, _TABLE, Rule("linear", rf"{_VALUE}|{_OUTPUT}", "q5k"), Rule("linear", "", "w4n32")),
    # What llama.cpp makes of a dense model (src/llama-quant.cpp).
    "q4_k_m": (
        *_LEFT,
        Rule("embedding", "", "q4k", only=UNTIED),
        Rule("embedding", "", "q6k"),
        Rule("linear", _HEAD, "q6k"),
        Rule("linear", _FUSED, "q5k"),
        Rule("linear", rf"{_VALUE}|{_DOWN}", "q6k", only=MORE_BITS),
        Rule("linear", "", "q4k"),
    ),
    "int8": (*_LEFT, _TABLE, Rule("linear", "", "w8c")),
    NONE: (Rule("any", "", FLOAT, "recipe 'none'"),),
}
