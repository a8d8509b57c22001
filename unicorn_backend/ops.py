"""The op contract: schema, fake and shapes of every `unicorn::` op, side by side.

The plain-torch meaning of each op is in `reference.py` (the oracle of the tests); the CPU kernels
are in `ops/` (C++).

Shape letters: `B` batch, `T` query tokens, `S` key tokens, `H`/`Hkv` heads, `D` head dim,
`K` in, `N` out, `F` FFN width. A linear is `y[..., N] = x[..., K] . W[N, K]^T`.

**Weight** arguments are tensor lists, because one region may mix schemes. With
`N16 = ceil(N / 16)`, `K32 = ceil(K / 32)` and `K256 = ceil(K / 256)` (padding is zero-valued weights):

| scheme  | list       | tensors |
|---------|------------|---------|
| float   | `[w]`      | bf16, fp16 or fp32 `[N, K]` |
| `w4g32` | `[w, s]`   | uint8 `[N16, K32, 4, 16, 4]`, fp16 scale `[N16, K32, 16]` |
| `w4n32` | `[w, s, c]`| uint8 `[N16, K32, 4, 16, 4]`, fp16 scale `[N16, K32, 16]`, int8 codebook `[16]` |
| `w4m32` | `[w, s, m]`| uint8 `[N16, K32, 4, 16, 4]`, fp16 scale and minimum `[N16, K32, 16]` |
| `q4k`   | `[w, s, d]`| uint8 `[N16, K32, 4, 16, 4]`, uint8 `[N16, K32, 2, 16]`, fp16 `[N16, K256, 2, 16]` |
| `q5k`   | `[w, s, d]`| uint8 `[N16, K32, 5, 16, 4]`, uint8 `[N16, K32, 2, 16]`, fp16 `[N16, K256, 2, 16]` |
| `q6k`   | `[w, s, d]`| uint8 `[N16, K32, 6, 16, 4]`, int8 `[N16, K32, 2, 16]`, fp16 `[N16, K256, 1, 16]` |
| `w8g32` | `[w, s]`   | uint8 `[N16, K32, 8, 16, 4]`, fp16 scale `[N16, K32, 16]` |
| `w8c`   | `[w, s]`   | uint8 `[N16, K32, 8, 16, 4]`, fp32 scale `[N16, 16]` |
| `w8a`   | `[w, s, z]`| uint8 `[N16, K32, 8, 16, 4]`, fp32 scale `[N16, 16]`, uint8 zero point `[N16, 16]` |

- `w4g32` (tile "T16"): row `n = 16*i + r`; byte `w[i, g, c, r, j]` holds `k = 32*g + 8*c + j` in
  its low nibble and `k = 32*g + 8*c + 4 + j` in its high nibble; value = `s[i, g, r] * (nibble - 8)`.
- `w4n32`: the same bytes; value = `s[i, g, r] * c[nibble]`. A codebook may lack a zero, so the padding of columns
  is anything: activations are zero there. The quantizer's codebook is that of GGUF's IQ4_NL.
- `w4m32`: the same bytes; value = `s[i, g, r] * nibble + m[i, g, r]`.
- `q4k`, `q5k`, `q6k`: what GGUF's Q4_K, Q5_K and Q6_K hold, to the bit. Nibbles as above; bits 4 and 5 of column
  `k = 32*g + 4*c + j` are in the chunks behind: bit `c` of `w[i, g, 4, r, j]` (q5k), bits `2*(c % 4)` and the next of
  `w[i, g, 4 + c // 4, r, j]` (q6k). With `D = d[i, g // 8, :, r]` and `S = s[i, g, :, r]`: value =
  `D[0]*S[0] * q - D[1]*S[1]` (q4k, q5k), `D[0] * (S[k % 32 // 16] * (q - 32))` (q6k); the products of scales are exact.
- `w8g32`: bytes as `w8c`; value = `s[i, g, r] * (byte - 128)`.
- `w8c`: byte `w[i, g, c, r, j]` holds `k = 32*g + 4*c + j`; value = `s[i, r] * (byte - 128)`.
- `w8a`: same bytes; value = `s[i, r] * (byte - z[i, r])`.

**Activations** that meet a quantized weight are quantized per token in groups of 32 along K
(`a8g32`): `scale = amax / 127` (fp32), `q = rint(x * (127 / amax))` in int8, round half to even,
a group whose amax is
below 1e-36 (so that `127 / amax` stays finite) -> `q = 0, scale = 0`. The sum over k inside a group is an
exact int32; the groups are
added in fp32 in ascending order with one fused multiply-add each, so every ISA, thread count
and token count M gives the same bits:
`acc = fma(float(isum[g]) * a_scale[g], w_scale[g], acc)` for `w4g32`, `w4n32`, `w8g32` and
`q6k` (whose `isum` has the scales of the half groups in it), the same and then
`acc = fma(float(sum of a) * a_scale[g], minimum[g], acc)` for `w4m32`, `q4k` and `q5k`, and
`acc = fma(float(isum[g]), a_scale[g], acc)`, then `acc * w_scale` for `w8c` / `w8a`, where `isum`
has the zero point already taken out (`sum a * (q - z)`, exact).

**Norms** (`norm_w`, `norm_eps`, `norm_offset`): RMS norm over the last dim in fp32,
`x * rsqrt(mean(x^2) + eps) * (norm_w + offset)`; `norm_eps=None` means no norm at all,
`norm_w=None` with an eps means a norm without weight. Inside a fused op the normalised value stays
fp32 until it is quantized (with a float weight it is rounded to the dtype of x first).

Every op returns tensors in the dtype of its activations (bf16, fp16 or fp32); sums, norms,
softmax and the residual add are fp32 inside, rounded once at the end.
The ops are inference only: an input that requires grad while grad mode is on raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unicorn_backend.layouts import ROW_SCALE

LIBRARY = torch.library.Library("unicorn", "DEF")

ACTIVATIONS = ("gelu_tanh", "gelu", "silu", "relu")

_NORM = "Tensor? norm_w, float? norm_eps, float norm_offset"
_POST = "Tensor? post_w, float? post_eps, float post_offset, Tensor? residual"

# linear: x [..., K] -> [..., n]. bias [n] or None.
LIBRARY.define("linear(Tensor x, Tensor[] w, Tensor? bias, int n) -> Tensor")

# experts_linear: a projection in a mixture of experts. x [M, K], or [M, k, K] with a row for each expert of a token;
# experts int64 [M, k] (outside [0, E): IndexError); w packed, [E * n, K]: the experts' weights one under another,
# n a multiple of 16; bias [E * n] or None. -> [M, k, n]. Reads the experts that are hit, each once.
LIBRARY.define("experts_linear(Tensor x, Tensor experts, Tensor[] w, Tensor? bias, int n) -> Tensor")

# embedding: ids int64 [...] -> [..., k] in `dtype`. Ids outside [0, num_rows) raise IndexError.
LIBRARY.define("embedding(Tensor ids, Tensor[] w, int num_rows, int k, ScalarType dtype) -> Tensor")

# rms_norm: x [..., D] -> same shape and dtype.
LIBRARY.define("rms_norm(Tensor x, Tensor? w, float eps, float offset) -> Tensor")

# int8_qkv: pre-norm, the three projections, q/k norm and rotary embedding.
# x [B, T, K]; cos/sin [B or 1, T, R], R <= D and even, or None (no rotary): the first R elements of a head become
# x*cos + swap(x)*sin, where swap gives (-x[R/2:], x[:R/2]), or, `interleaved`, (-x[1], x[0], -x[3], x[2], ...).
# bias: [] or [bq, bk, bv]. q_norm_w/k_norm_w [D] share eps and offset; `v_norm`: the value has a norm of that eps too,
# without a weight.
# -> q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, D], each contiguous.
LIBRARY.define(
    f"int8_qkv(Tensor x, {_NORM}, Tensor[] wq, Tensor[] wk, Tensor[] wv, Tensor[] bias, "
    "Tensor? q_norm_w, Tensor? k_norm_w, float? qk_norm_eps, float qk_norm_offset, "
    "Tensor? cos, Tensor? sin, int heads, int kv_heads, int head_dim, bool interleaved, bool v_norm) "
    "-> (Tensor, Tensor, Tensor)"
)

# int8_attention: scaled dot-product attention, output projection, post-norm, residual add.
# q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] (any strides with a dense last dim),
# mask: None, bool (True = attend) or float (added), broadcastable to [B, H, T, S];
# causal: query t sees keys s <= t + (S - T) ("bottom right"); with mask both apply.
# softcap 0.0 = off, else logits = softcap * tanh(logits / softcap) before the mask is added.
# k and v may be int8 rows from quantize_rows, [.., D + 4] and [.., Dv + 4]; they are read as such, all else is fp32.
# A row with every key masked gives zeros. residual [B, T, n] or None -> [B, T, n].
LIBRARY.define(
    "int8_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale, float softcap, "
    f"Tensor[] wo, Tensor? bo, int n, {_POST}) -> Tensor"
)

# int4_ffn: pre-norm, act(x Wg^T + bg) * (x Wu^T + bu), down projection, post-norm, residual add.
# x [..., K]; bias: [] or [bg, bu, bd]; f = FFN width, n = width out; residual [..., n] -> [..., n].
# Between the two projections the product stays fp32 until it is quantized (a8g32).
_FFN = f"Tensor x, {_NORM}, Tensor[] wg, Tensor[] wu, Tensor[] wd, Tensor[] bias, str act, int f, int n, {_POST}"
LIBRARY.define(f"int4_ffn({_FFN}) -> Tensor")

# sparse_ffn: the same for gates of which few are open: g becomes max(g - (mean + cutoff * std), 0), with mean and
# standard deviation (divided by f) over a token's f values; f is a multiple of 16. Rows of wu whose gates are closed
# for all tokens are not read, 16 at a time.
LIBRARY.define(f"sparse_ffn({_FFN}, float cutoff) -> Tensor")

# Rows of a KV cache, [B, H, S, D]. What these two return is dense in its last two dims and has room behind it, so
# that appending to it copies the new rows only; values are never shared: each result stays what it was.
# append_rows: the first `filled` rows of past are written -> their last `keep`, then `rows` [B, H, T, D].
# last_rows: the last min(S, count) rows of x.
LIBRARY.define("append_rows(Tensor past, Tensor rows, SymInt filled, SymInt keep) -> Tensor")
LIBRARY.define("last_rows(Tensor x, SymInt count) -> Tensor")

# quantize_rows: bfloat16, float16 or float32 [B, H, S, D] -> int8 [B, H, S, D + 4]: D values and the bytes of their
# scale, fp32 = max |x| / 127. A row that is not finite gets a scale that is not finite.
# dequantize_rows: back, in `dtype`.
LIBRARY.define("quantize_rows(Tensor x) -> Tensor")
LIBRARY.define("dequantize_rows(Tensor rows, ScalarType dtype) -> Tensor")

# The window of a static cache, [B, H, L, D], contiguous, tokens in order, in place.
# push_window_: it holds the last min(seen, L) tokens; appends one, dropping the oldest if it is full.
# set_window_: the last min(S, L) rows of full [B, H, S, D] become its first rows.
LIBRARY.define("push_window_(Tensor(a!) cache, Tensor row, SymInt seen) -> ()")
LIBRARY.define("set_window_(Tensor(a!) cache, Tensor full) -> ()")

# What positions decide. band_mask: bool [1, 1, T, S], true where lower <= key - query <= upper (indices from 0).
# rotary_tables: cos and sin of cat(f, f) with f = position * inv_freq, times scale, in `dtype`; positions int64 [B, T],
# inv_freq float32 [D / 2] -> [B, T, D] each.
LIBRARY.define("band_mask(SymInt queries, SymInt keys, SymInt lower, SymInt upper) -> Tensor")
LIBRARY.define("rotary_tables(Tensor positions, Tensor inv_freq, float scale, ScalarType dtype) -> (Tensor, Tensor)")

# The next token from scores, float32 [B, V], V the vocabulary.
# argmax: torch.argmax(scores, -1) -> int64 [B].
# sample: the token int64 [B, 1] that transformers draws with its top-k and top-p (0 and 1.0 are off; `keep`: their
# min_tokens_to_keep), softmax and torch.multinomial, and the generator is left as those leave it. Where rounding or the
# order of equal scores in a sort may decide, and where scores are NaN: empty, and the generator untouched.
LIBRARY.define("argmax(Tensor scores) -> Tensor")
LIBRARY.define("sample(Tensor scores, int top_k, float top_p, int keep, Generator? generator=None) -> Tensor")

# For tests and benchmarks: force an instruction set ("" = the best; returns the one in use), list those
# of this CPU, an activation elementwise (fp32, a multiple of 16 values), read all bytes of a tensor,
# int8 multiply-adds from registers (returns their number). For who computes in another thread from now on: end the
# OpenMP threads that wait for the calling one.
LIBRARY.define("set_isa(str name) -> str")
LIBRARY.define("isas() -> str[]")
LIBRARY.define("activate(Tensor x, str act) -> Tensor")
LIBRARY.define("read_bytes(Tensor data, bool two_levels=False) -> int")
LIBRARY.define("dot_peak(int steps) -> int")
LIBRARY.define("release_threads() -> ()")


@torch.library.register_fake("unicorn::linear")
def _linear_fake(x: Tensor, w: list[Tensor], bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], n))


@torch.library.register_fake("unicorn::experts_linear")
def _experts_linear_fake(x: Tensor, experts: Tensor, w: list[Tensor], bias: Tensor | None, n: int) -> Tensor:
    return x.new_empty((*experts.shape, n))


@torch.library.register_fake("unicorn::embedding")
def _embedding_fake(ids: Tensor, w: list[Tensor], num_rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, k), dtype=dtype)


@torch.library.register_fake("unicorn::rms_norm")
def _rms_norm_fake(x: Tensor, w: Tensor | None, eps: float, offset: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("unicorn::int8_qkv")
def _int8_qkv_fake(
    x: Tensor,
    norm_w: Tensor | None,
    norm_eps: float | None,
    norm_offset: float,
    wq: list[Tensor],
    wk: list[Tensor],
    wv: list[Tensor],
    bias: list[Tensor],
    q_norm_w: Tensor | None,
    k_norm_w: Tensor | None,
    qk_norm_eps: float | None,
    qk_norm_offset: float,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    head_dim: int,
    interleaved: bool,
    v_norm: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, t = x.shape[0], x.shape[1]
    q = x.new_empty((b, heads, t, head_dim))
    k = x.new_empty((b, kv_heads, t, head_dim))
    return q, k, k.new_empty(k.shape)


@torch.library.register_fake("unicorn::int8_attention")
def _int8_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    wo: list[Tensor],
    bo: Tensor | None,
    n: int,
    post_w: Tensor | None,
    post_eps: float | None,
    post_offset: float,
    residual: Tensor | None,
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], n))


@torch.library.register_fake("unicorn::sparse_ffn")
@torch.library.register_fake("unicorn::int4_ffn")
def _ffn_fake(
    x: Tensor,
    norm_w: Tensor | None,
    norm_eps: float | None,
    norm_offset: float,
    wg: list[Tensor],
    wu: list[Tensor],
    wd: list[Tensor],
    bias: list[Tensor],
    act: str,
    f: int,
    n: int,
    post_w: Tensor | None,
    post_eps: float | None,
    post_offset: float,
    residual: Tensor | None,
    cutoff: float | None = None,
) -> Tensor:
    torch._check(act in ACTIVATIONS, lambda: f"feed-forward: act must be one of {ACTIVATIONS}, got {act!r}")
    return x.new_empty((*x.shape[:-1], n))


def _with_room(x: Tensor, rows: torch.SymInt | int) -> Tensor:
    b, h, _, d = x.shape
    head = (rows + 1) * d  # how much room there is shows at run time only
    return x.new_empty_strided((b, h, rows, d), (h * head, head, d, 1))


@torch.library.register_fake("unicorn::append_rows")
def _append_rows_fake(past: Tensor, rows: Tensor, filled: int, keep: int) -> Tensor:
    return _with_room(rows, torch.sym_min(filled, keep) + rows.shape[2])


@torch.library.register_fake("unicorn::last_rows")
def _last_rows_fake(x: Tensor, count: int) -> Tensor:
    return _with_room(x, torch.sym_min(x.shape[2], count))


@torch.library.register_fake("unicorn::band_mask")
def _band_mask_fake(queries: int, keys: int, lower: int, upper: int) -> Tensor:
    return torch.empty(1, 1, queries, keys, dtype=torch.bool)


@torch.library.register_fake("unicorn::rotary_tables")
def _rotary_tables_fake(positions: Tensor, inv_freq: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos = inv_freq.new_empty((*positions.shape, 2 * inv_freq.shape[0]), dtype=dtype)
    return cos, cos.new_empty(cos.shape)


@torch.library.register_fake("unicorn::quantize_rows")
def _quantize_rows_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] + ROW_SCALE), dtype=torch.int8)


@torch.library.register_fake("unicorn::dequantize_rows")
def _dequantize_rows_fake(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], rows.shape[-1] - ROW_SCALE), dtype=dtype)


torch.library.register_fake("unicorn::push_window_", lambda cache, row, seen: None)
torch.library.register_fake("unicorn::set_window_", lambda cache, full: None)
