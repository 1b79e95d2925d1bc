"""Graph to graph rules: the same numbers in fewer, larger ops, or observed on their way.

A rule is `rule(graph, capture) -> graph`. It may drop a value only if nobody else reads it and no captured
stage names it. A backend lists the rules it has kernels for. Knows patterns, not why they are fast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from .graph import Graph, Node, Operand, Value, replay

Rule = Callable[[Graph, Collection[str]], Graph]

SUMS = "sum_squares"  # begins the names of the states that `observe` makes


def _producers(graph: Graph) -> dict[Value, Node]:
    return {value: node for node in graph.nodes for value in node.outputs}


def _private(graph: Graph, capture: Collection[str]) -> Callable[[Value], bool]:
    """Tells of a value whether one node alone reads it and nobody looks at it."""
    users = graph.users()
    seen = {graph.stages[name] for name in capture} | set(graph.required)
    return lambda value: len(users.get(value, ())) == 1 and value not in seen


def fuse_gates(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """mul(silu(linear(x, gate)), linear(x, up)) -> gated_linear(x, gate, up)."""
    made_by, private = _producers(graph), _private(graph, capture)
    gated: dict[Node, tuple[Value, Value, Value]] = {}
    absorbed: set[Node] = set()
    for node in graph.nodes:
        silu, up = (made_by.get(v) for v in node.inputs) if node.op == "mul" else (None, None)
        gate = made_by.get(silu.inputs[0]) if silu and silu.op == "silu" else None
        if not gate or not up or gate.op != "linear" or up.op != "linear":
            continue
        parts = (silu, gate, up)
        plain = len(gate.inputs) == len(up.inputs) == 2 or (gate.inputs[2:] == up.inputs[2:] == (None,))
        if plain and gate.inputs[0] is up.inputs[0] and all(private(p.outputs[0]) for p in parts):
            gated[node] = (gate.inputs[0], gate.inputs[1], up.inputs[1])
            absorbed.update(parts)

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        return (new.gated_linear(*(current(v) for v in gated[node])),) if node in gated else None

    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def fuse_linears(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """linear(x, a), linear(x, b), … of one x -> linears(x, (a, b, …)) at the place of the first."""
    groups: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            groups.setdefault(node.inputs[0], []).append(node)
    group_of = {node: nodes for nodes in groups.values() if len(nodes) > 1 for node in nodes}
    results: dict[Node, Value] = {}

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node not in group_of:
            return None
        if node not in results:
            nodes = group_of[node]
            weights = tuple(current(n.inputs[1]) for n in nodes)
            biases = tuple(current(n.inputs[2]) if len(n.inputs) > 2 else None for n in nodes)
            fused = new.linears(current(node.inputs[0]), weights, biases)
            results.update(zip(nodes, fused, strict=True))
        return (results[node],)

    return replay(graph, visit)


def fuse_add_norms(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """s = add(a, b); rms_norm(s) -> (s, n) = add_rms_norm(a, b): the sum is kept, others may read it."""
    made_by = _producers(graph)
    norm_of: dict[Node, Node] = {}
    for node in graph.nodes:
        total = made_by.get(node.inputs[0]) if node.op == "rms_norm" else None
        if total and total.op == "add" and total.inputs[0].shape == total.inputs[1].shape:
            norm_of.setdefault(total, node)
    norms = set(norm_of.values())
    results: dict[Node, Value] = {}

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node in norms:
            return (results[node],)
        norm = norm_of.get(node)
        if norm is None:
            return None
        total, results[norm] = new.add_rms_norm(
            current(node.inputs[0]), current(node.inputs[1]), current(norm.inputs[1]), **norm.attrs
        )
        return (total,)

    return replay(graph, visit)


def fuse_norm_ropes(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """rope(rms_norm(x)) -> norm_rope(x)."""
    made_by, private = _producers(graph), _private(graph, capture)
    norm_of: dict[Node, Node] = {}
    for node in graph.nodes:
        norm = made_by.get(node.inputs[0]) if node.op == "rope" else None
        if norm and norm.op == "rms_norm" and private(norm.outputs[0]):
            norm_of[node] = norm

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        norm = norm_of.get(node)
        if norm is None:
            return None
        operands = (norm.inputs[0], norm.inputs[1], node.inputs[1])
        return (new.norm_rope(*map(current, operands), **norm.attrs, **node.attrs),)

    absorbed = set(norm_of.values())
    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def fuse_stores(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """norm_rope(q); kv_store(norm_rope(k)); kv_store(v) on their way to one kv_attention -> norm_rope_store, at the
    place of the first. Goes after `fuse_norm_ropes`."""
    made_by, private = _producers(graph), _private(graph, capture)
    rank = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[Node, tuple[Node, ...]] = {}  # norm_rope of q: that of k, and the two stores
    for node in graph.nodes:
        if node.op != "kv_attention":
            continue
        q, keys, values = (made_by.get(v) for v in node.inputs[:3])
        k = made_by.get(keys.inputs[1]) if keys and keys.op == "kv_store" else None
        if not q or not k or not values or (q.op, k.op, values.op) != ("norm_rope", "norm_rope", "kv_store"):
            continue
        alike = q.attrs == k.attrs and private(q.outputs[0]) and private(k.outputs[0])
        ready = all(rank[made_by[v]] < rank[q] for v in (k.inputs[0], values.inputs[1]) if v in made_by)
        if alike and ready and rank[q] < rank[k]:
            found[q] = (k, keys, values)
    results: dict[Node, Value] = {}

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node in results:
            return (results[node],)
        if node not in found:
            return None
        k, keys, values = found[node]
        operands = (node.inputs[0], k.inputs[0], values.inputs[1], node.inputs[1], k.inputs[1])
        operands += (keys.inputs[0], values.inputs[0], node.inputs[2])
        q, results[keys], results[values] = new.norm_rope_store(*map(current, operands), **node.attrs)
        return (q,)

    absorbed = {k for k, _, _ in found.values()}
    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def fuse_steps(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """kv_attention(norm_rope_store(q, k, v)) of one token -> norm_rope_attention. Goes after `fuse_stores`."""
    made_by, private = _producers(graph), _private(graph, capture)
    attention_of: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op != "kv_attention" or node.inputs[0].shape[0] != 1 or not private(node.inputs[0]):
            continue
        store = made_by.get(node.inputs[0])
        if store and store.op == "norm_rope_store" and node.inputs == (*store.outputs, store.inputs[-1]):
            attention_of[store] = node
    results: dict[Node, Value] = {}

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node in results:
            return (results[node],)
        if node not in attention_of:
            return None
        outputs = new.norm_rope_attention(*map(current, node.inputs), **node.attrs)
        results[attention_of[node]] = outputs[0]
        return outputs  # the first in the place of the queries, which only attention reads

    return replay(graph, visit)


def fuse_convolutions(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """permute(gelu(conv2d(... gelu(conv2d(x))))) of convolutions that move alike -> conv_stack(x)."""
    made_by, private = _producers(graph), _private(graph, capture)
    stacks: dict[Node, list[Node]] = {}  # the permute: its convolutions, the last first
    absorbed: set[Node] = set()
    for node in graph.nodes:
        if node.op != "permute":
            continue
        convolutions, value = [], node.inputs[0]
        while (gelu := made_by.get(value)) and gelu.op == "gelu" and private(value):
            conv = made_by.get(gelu.inputs[0])
            if not conv or conv.op != "conv2d" or not private(gelu.inputs[0]):
                break
            if convolutions and conv.attrs != convolutions[0].attrs:
                break
            convolutions.append(conv)
            absorbed.update((gelu, conv))
            value = conv.inputs[0]
        if convolutions:
            stacks[node] = convolutions

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node not in stacks:
            return None
        convolutions = stacks[node][::-1]
        weights, biases = (tuple(conv.inputs[i] for conv in convolutions) for i in (1, 2))
        operands = (convolutions[0].inputs[0], weights, biases)
        return (new.conv_stack(*map(current, operands), **convolutions[0].attrs, **node.attrs),)

    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def widen_linears(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """linear, linears, gated_linear -> wide_linear, which the rules below widen further."""

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        x, *rest = (current(v) for v in node.inputs)
        if node.op == "gated_linear":
            return new.wide_linear(x, None, tuple(rest), (None, None), None, eps=0.0, close="gate")
        if node.op == "linears":
            return new.wide_linear(x, None, *rest, None, eps=0.0, close="none")
        if node.op == "linear":
            weight, bias = (*rest, None)[:2]
            return new.wide_linear(x, None, (weight,), (bias,), None, eps=0.0, close="none")
        return None

    return replay(graph, visit)


def absorb_norms(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """wide_linear(rms_norm(x)) and wide_linear(layer_norm(x)) -> wide_linear(x, norm)."""
    made_by, private = _producers(graph), _private(graph, capture)
    norm_of = {}
    for node in graph.nodes:
        norm = made_by.get(node.inputs[0]) if node.op == "wide_linear" else None
        if norm and norm.op in ("rms_norm", "layer_norm") and private(norm.outputs[0]):
            norm_of[node] = norm

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        norm = norm_of.get(node)
        if norm is None:
            return None
        rest = (current(v) for v in node.inputs[2:])
        attrs = {**node.attrs, **norm.attrs}
        return new.wide_linear(current(norm.inputs[0]), current(norm.inputs[1:]), *rest, **attrs)

    absorbed = set(norm_of.values())
    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def absorb_closings(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """gelu(wide_linear(x)), add(r, wide_linear(x)) in either order, and argmax(wide_linear(x)) of one token
    -> wide_linear(x) that does it."""
    made_by, private = _producers(graph), _private(graph, capture)
    closed: dict[Node, tuple[Node, Value | None]] = {}  # the op that closes: the linear, and what is added
    for node in graph.nodes:
        lone = node.op == "argmax" and node.inputs[0].shape[:-1] == (1,)
        pairs = [(node.inputs[0], None)] if node.op == "gelu" or lone else []
        if node.op == "add" and node.inputs[0].shape == node.inputs[1].shape:
            pairs = [node.inputs[::-1], node.inputs]
        for value, residual in pairs:
            linear = made_by.get(value)
            single = linear and linear.op == "wide_linear" and len(linear.outputs) == 1 and private(value)
            if single and linear.inputs[4] is None and linear.attrs["close"] == "none":
                closed[node] = (linear, residual)
                break

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> tuple[Value, ...] | None:
        if node not in closed:
            return None
        linear, residual = closed[node]
        operands = [current(v) for v in (*linear.inputs[:4], residual)]
        attrs = linear.attrs if residual is not None else {**linear.attrs, "close": node.op}
        return new.wide_linear(*operands, **attrs)

    absorbed = {linear for linear, _ in closed.values()}
    return replay(graph, visit, [n for n in graph.nodes if n not in absorbed])


def observe(graph: Graph, capture: Collection[str] = ()) -> Graph:
    """linear(x, w) -> the same, and before it sum_squares(state, x), which is required.

    Weights that meet the same x share a state: its name lists them, see `observed_weights`. An x in windows
    [n_windows, n_tokens, n_cols] is observed as far as the input `lengths` says; the rest is padding. Goes before
    fusions.
    """
    weights: dict[Value, list[str]] = {}
    for node in graph.nodes:
        if node.op == "linear":
            weights.setdefault(node.inputs[0], []).append(node.inputs[1].name)
    lengths = graph.leaves.get(("input", "lengths"))
    observed: dict[Value, Value] = {}

    def visit(new: Graph, node: Node, current: Callable[[Operand], Operand]) -> None:
        x = node.inputs[0]
        if node.op == "linear" and x not in observed:
            sums = new.state(" ".join([SUMS, *weights[x]]), (x.shape[-1] + 1,))
            observed[x] = new.sum_squares(sums, current(x), current(lengths) if len(x.shape) == 3 else None)

    graph = replay(graph, visit)
    graph.required += observed.values()
    return graph


def observed_weights(state: str) -> list[str]:
    """The weights whose input the state of this name is about; none for a state that `observe` did not make."""
    first, *weights = state.split(" ")
    return weights if first == SUMS else []
