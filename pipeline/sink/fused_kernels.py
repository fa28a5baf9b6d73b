# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Triton kernels of the attention backward with the sink's gradient in it; `fused.py` gives the formula and calls
them.

The grid is (blocks of the longest text, heads, texts). A program owns one block of one head of one text and takes the
tiles it meets in the other direction one by one; past the end of its text it returns at once. All positions count from
the start of the text, in tokens. There are no atomics: two runs give the same bits.

Most tiles are inner: every query sees every key and none of the keys is the sink. Only the others, the edges, pay for
masks and for the sink's own term.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp is two

# What changes from batch to batch: by default Triton compiles anew for values of 1 and for multiples of 16.
CHANGING = ["tokens", "position", "window"]


@triton.jit(do_not_specialize=CHANGING)
def rows_kernel(
    q, k, out, grad_out, lse, grad_p, lse_log2, common, pull, cu_seqlens, q_row, q_head, k_row, k_head,
    tokens, position, window, scale, softcap,
    RATIO: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """What each query needs later, [H,n]: its LSE in units of ln 2; `pull` = g p of the sink, 0 where the query does
    not see it or is the sink; `common` = dO.O + pull, which every logit of the query subtracts."""
    head = tl.program_id(1)
    start, length = _text(cu_seqlens)
    first = tl.program_id(0) * OWN
    if first >= length:
        return
    o_row = tl.num_programs(1) * DIM
    o_text = start * o_row + head * DIM
    out_tile = _load_rows(out + o_text, o_row, first, length, OWN, WIDTH, DIM, True).to(tl.float32)
    grad_tile = _load_rows(grad_out + o_text, o_row, first, length, OWN, WIDTH, DIM, True).to(tl.float32)
    q_text = _of_head(q, start, head, q_row, q_head)
    k_text = _of_head(k, start, head // RATIO, k_row, k_head)
    q_tile = _load_rows(q_text, q_row, first, length, OWN, WIDTH, DIM, True).to(tl.float32)
    k_sink = _load_rows(k_text, k_row, position, length, 1, WIDTH, DIM, True).to(tl.float32)
    logits, _ = _logits(tl.sum(q_tile * k_sink, axis=1), scale, softcap, CAPPED)

    queries = first + tl.arange(0, OWN)
    there = queries < length
    sees = there & (queries > position) & (queries - position < window)
    here = head * tokens + start + queries
    lse_row = tl.load(lse + here, mask=there, other=0.0) * LOG2E
    pull_row = tl.load(grad_p + here, mask=sees, other=0.0) * tl.where(sees, tl.exp2(logits - lse_row), 0.0)
    tl.store(lse_log2 + here, lse_row, mask=there)
    tl.store(common + here, tl.sum(out_tile * grad_tile, axis=1) + pull_row, mask=there)
    tl.store(pull + here, pull_row, mask=there)


@triton.jit(do_not_specialize=CHANGING)
def keys_kernel(
    q, k, v, grad_out, lse_log2, common, pull, grad_k, grad_v, cu_seqlens, q_row, q_head, k_row, k_head, v_row, v_head,
    tokens, position, window, scale, softcap,
    RATIO: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, PASSING: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, summed over the queries that see them in the RATIO heads that share them."""
    group = tl.program_id(1)
    start, length = _text(cu_seqlens)
    first = tl.program_id(0) * OWN  # the blocks that most queries see come first
    if first >= length:
        return
    o_row = tl.num_programs(1) * RATIO * DIM
    k_tile = _load_rows(_of_head(k, start, group, k_row, k_head), k_row, first, length, OWN, WIDTH, DIM, True)
    v_tile = _load_rows(_of_head(v, start, group, v_row, v_head), v_row, first, length, OWN, WIDTH, DIM, True)
    sum_k = tl.zeros([OWN, WIDTH], tl.float32)
    sum_v = tl.zeros([OWN, WIDTH], tl.float32)

    # Queries low <= i < high see some of the keys, and of them those from inner_low to inner_high see all.
    low = first // PASSING * PASSING
    high = tl.minimum(length, first + OWN - 1 + window)
    inner_low = tl.cdiv(first + OWN - 1, PASSING) * PASSING
    inner_high = tl.maximum(inner_low, tl.minimum(length, first + window) // PASSING * PASSING)
    if (first <= position) & (position < first + OWN):
        inner_high = inner_low  # the sink is here
    inner = inner_high - inner_low
    for head in range(group * RATIO, (group + 1) * RATIO):
        q_text = _of_head(q, start, head, q_row, q_head)
        grad_text = grad_out + start * o_row + head * DIM
        here = head * tokens + start
        sum_k, sum_v = _add_queries(
            sum_k, sum_v, k_tile, v_tile, q_text, grad_text, lse_log2 + here, common + here, pull + here, q_row, o_row,
            inner_low, inner_high, 0, 0, first, length, position, window, scale, softcap,
            DIM, WIDTH, OWN, PASSING, CAPPED, False,
        )  # fmt: skip
        sum_k, sum_v = _add_queries(
            sum_k, sum_v, k_tile, v_tile, q_text, grad_text, lse_log2 + here, common + here, pull + here, q_row, o_row,
            low, high - inner, inner_low, inner, first, length, position, window, scale, softcap,
            DIM, WIDTH, OWN, PASSING, CAPPED, True,
        )  # fmt: skip
    row = tl.num_programs(1) * DIM
    _store_rows(grad_k + start * row + group * DIM, row, first, length, sum_k * scale, OWN, WIDTH, DIM)
    _store_rows(grad_v + start * row + group * DIM, row, first, length, sum_v, OWN, WIDTH, DIM)


@triton.jit
def _add_queries(
    sum_k, sum_v, k_tile, v_tile, q_text, grad_text, lse_log2, common, pull, q_row, o_row,
    low, high, gap_at, gap, first, length, position, window, scale, softcap,
    DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, PASSING: tl.constexpr, CAPPED: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """The sums [OWN,WIDTH] of the keys from `first` on, plus what one head's queries low <= i < high give; those from
    gap_at on lie `gap` further."""
    keys = first + tl.arange(0, OWN)
    for at in range(low, high, PASSING):
        block = at + tl.where(at >= gap_at, gap, 0)
        queries = block + tl.arange(0, PASSING)
        q_tile = _load_rows(q_text, q_row, block, length, PASSING, WIDTH, DIM, EDGE)
        grad_tile = _load_rows(grad_text, o_row, block, length, PASSING, WIDTH, DIM, EDGE)
        lse_row, common_row, pull_row = _load_query_numbers(lse_log2, common, pull, queries, length, EDGE)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        p, slope = _probabilities(
            products, lse_row[None, :], queries[None, :], keys[:, None], window, scale, softcap, CAPPED, EDGE
        )
        sum_v = tl.dot(p.to(grad_tile.dtype), grad_tile, sum_v, input_precision="ieee")
        grad_probs = tl.dot(v_tile, tl.trans(grad_tile), input_precision="ieee")
        grad_logits = _grad_logits(
            p, grad_probs, slope, common_row[None, :], pull_row[None, :], keys[:, None], position, EDGE
        )
        sum_k = tl.dot(grad_logits.to(q_tile.dtype), q_tile, sum_k, input_precision="ieee")
    return sum_k, sum_v


@triton.jit(do_not_specialize=CHANGING)
def queries_kernel(
    q, k, v, grad_out, lse_log2, common, pull, grad_q, cu_seqlens, q_row, q_head, k_row, k_head, v_row, v_head,
    tokens, position, window, scale, softcap,
    RATIO: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, PASSING: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries."""
    head = tl.program_id(1)
    start, length = _text(cu_seqlens)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN  # the blocks that see most keys come first
    if first >= length:
        return
    queries = first + tl.arange(0, OWN)
    o_row = tl.num_programs(1) * DIM
    o_text = start * o_row + head * DIM
    here = head * tokens + start
    q_tile = _load_rows(_of_head(q, start, head, q_row, q_head), q_row, first, length, OWN, WIDTH, DIM, True)
    grad_tile = _load_rows(grad_out + o_text, o_row, first, length, OWN, WIDTH, DIM, True)
    lse_row, common_row, pull_row = _load_query_numbers(
        lse_log2 + here, common + here, pull + here, queries, length, True
    )
    k_text = _of_head(k, start, head // RATIO, k_row, k_head)
    v_text = _of_head(v, start, head // RATIO, v_row, v_head)
    sum_q = tl.zeros([OWN, WIDTH], tl.float32)

    # Keys low <= j < high are seen by some of the queries; those from inner_low to inner_high, past the sink, by all.
    low = tl.maximum(0, first - window + 1) // PASSING * PASSING
    high = tl.minimum(length, first + OWN)
    inner_low = tl.cdiv(tl.maximum(0, first + OWN - window), PASSING) * PASSING
    inner_low = tl.maximum(inner_low, (position // PASSING + 1) * PASSING)
    inner_high = tl.maximum(inner_low, (first + 1) // PASSING * PASSING)
    inner = inner_high - inner_low
    sum_q = _add_keys(
        sum_q, q_tile, grad_tile, lse_row, common_row, pull_row, queries, k_text, v_text, k_row, v_row,
        inner_low, inner_high, 0, 0, length, position, window, scale, softcap, DIM, WIDTH, PASSING, CAPPED, False,
    )  # fmt: skip
    sum_q = _add_keys(
        sum_q, q_tile, grad_tile, lse_row, common_row, pull_row, queries, k_text, v_text, k_row, v_row,
        low, high - inner, inner_low, inner, length, position, window, scale, softcap,
        DIM, WIDTH, PASSING, CAPPED, True,
    )  # fmt: skip
    _store_rows(grad_q + o_text, o_row, first, length, sum_q * scale, OWN, WIDTH, DIM)


@triton.jit
def _add_keys(
    sum_q, q_tile, grad_tile, lse_row, common_row, pull_row, queries, k_text, v_text, k_row, v_row,
    low, high, gap_at, gap, length, position, window, scale, softcap,
    DIM: tl.constexpr, WIDTH: tl.constexpr, PASSING: tl.constexpr, CAPPED: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """sum_q [OWN,WIDTH] plus what the keys low <= j < high give; those from gap_at on lie `gap` further."""
    for at in range(low, high, PASSING):
        block = at + tl.where(at >= gap_at, gap, 0)
        keys = block + tl.arange(0, PASSING)
        k_tile = _load_rows(k_text, k_row, block, length, PASSING, WIDTH, DIM, EDGE)
        v_tile = _load_rows(v_text, v_row, block, length, PASSING, WIDTH, DIM, EDGE)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p, slope = _probabilities(
            products, lse_row[:, None], queries[:, None], keys[None, :], window, scale, softcap, CAPPED, EDGE
        )
        grad_probs = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        grad_logits = _grad_logits(
            p, grad_probs, slope, common_row[:, None], pull_row[:, None], keys[None, :], position, EDGE
        )
        sum_q = tl.dot(grad_logits.to(k_tile.dtype), k_tile, sum_q, input_precision="ieee")
    return sum_q


@triton.jit
def _probabilities(
    products, lse_log2, queries, keys, window, scale, softcap, CAPPED: tl.constexpr, EDGE: tl.constexpr
):
    """P of a tile from q.k, fp32, and the slope of its logits; the other tensors broadcast over the tile."""
    logits, slope = _logits(products, scale, softcap, CAPPED)
    p = tl.exp2(logits - lse_log2)
    if EDGE:
        behind = queries - keys
        p = tl.where((behind >= 0) & (behind < window), p, 0.0)
    return p, slope


@triton.jit
def _grad_logits(p, grad_probs, slope, common, pull, keys, position, EDGE: tl.constexpr):
    """dL/d(scale q.k) of a tile, fp32, from P and dP = dO.v: P (dP - common), and `pull` more in the sink's column.

    There the two make pull (1 - P), which is small at P near 1: so it is done before anything is rounded to 16 bits.
    """
    grad_logits = p * (grad_probs - common)
    if EDGE:
        grad_logits += tl.where(keys == position, pull, 0.0)
    return grad_logits * slope


@triton.jit
def _logits(products, scale, softcap, CAPPED: tl.constexpr):
    """Logits in units of ln 2 from q.k, and their slope in scale q.k: 1, or 1 - tanh^2 under a soft cap."""
    logits = products * (scale * LOG2E)
    slope = 1.0
    if CAPPED:
        half = 1.0 / (1.0 + tl.exp2(logits * (2.0 / softcap)))  # (1 - tanh) / 2
        logits = (1.0 - 2.0 * half) * (softcap * LOG2E)
        slope = 4.0 * half * (1.0 - half)
    return logits, slope


@triton.jit
def _text(cu_seqlens):
    """First token of this program's text (64 bits: offsets in long rows do not fit 32) and its length."""
    start = tl.load(cu_seqlens + tl.program_id(2))
    return start.to(tl.int64), tl.load(cu_seqlens + tl.program_id(2) + 1) - start


@triton.jit
def _of_head(tensor, start, head, row, head_stride):
    """Where a text begins in one head of a tensor with these strides."""
    return tensor + start * row + head * tl.cast(head_stride, tl.int64)


@triton.jit
def _load_rows(
    text, row, first, length, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, EDGE: tl.constexpr
):
    """Rows of one head from `first` on, [ROWS,WIDTH]: zeros past DIM and, at an edge, past the text."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    pointers = text + first * tl.cast(row, tl.int64) + rows * row + columns
    if EDGE:
        tile = tl.load(pointers, mask=(first + rows < length) & (columns < DIM), other=0.0)
    elif DIM < WIDTH:
        tile = tl.load(pointers, mask=columns < DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store_rows(text, row, first, length, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    pointers = text + first * tl.cast(row, tl.int64) + rows * row + columns
    tl.store(pointers, tile.to(text.dtype.element_ty), mask=(first + rows < length) & (columns < DIM))


@triton.jit
def _load_query_numbers(lse_log2, common, pull, queries, length, EDGE: tl.constexpr):
    """What rows_kernel found for some queries. Past the text it is 0, as are q and dO there, and adds nothing."""
    if EDGE:
        there = queries < length
        lse_row = tl.load(lse_log2 + queries, mask=there, other=0.0)
        common_row = tl.load(common + queries, mask=there, other=0.0)
        pull_row = tl.load(pull + queries, mask=there, other=0.0)
    else:
        lse_row = tl.load(lse_log2 + queries)
        common_row = tl.load(common + queries)
        pull_row = tl.load(pull + queries)
    return lse_row, common_row, pull_row
