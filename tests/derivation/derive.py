"""Independent derivation of the editing methods in numpy, float64, from their papers; it shares no code with kedit.
  python derive.py           recompute every out_* from the in_*/w.* arrays of derivation.npz and compare with what is stored
  python derive.py --write   derive every out_* anew from the inputs of derivation.npz, and write it
  python derive.py --test    the internal checks (finite differences, dense solves, k -> v*, ...)
Gradients are complex-step derivatives (imaginary step 1e-30: exact to rounding); nothing is back-propagated by hand."""

import os
import sys

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
H = 1e-30


# ---------------------------------------------------------------- model
def rms(x, g):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * g


def silu(x):
    return x / (1 + np.exp(-x))


def logsm(z):
    z = z - z.real.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def rot(x, c, s):  # x: D, heads, n, hd
    h = x.shape[-1] // 2
    return x * c + np.concatenate([-x[..., h:], x[..., :h]], -1) * s


class Net:
    """W: name -> array. forward(ids, add, rep): `add` {(site, layer): array broadcast to (D, n, dim)} is added to a site's output,
    `rep` {(site, layer): (position, (D, dim))} replaces it at one position. Sites: ln2, gate, up, act (= input of down_proj), attn (o_proj output),
    mlp (down_proj output), block (block output). Returns logits (D, n, V) and every site's value."""

    def __init__(self, inp):
        self.V, self.d, self.m, self.L, self.nh, self.nkv = [int(x) for x in inp["in_config"]]
        self.W = {k[2:]: v for k, v in inp.items() if k.startswith("w.")}
        self.cos, self.sin = inp["in_rope_cos"], inp["in_rope_sin"]

    def copy(self):
        o = object.__new__(Net)
        o.__dict__.update(self.__dict__)
        o.W = dict(self.W)
        return o

    def down(self, l):
        return self.W[f"model.layers.{l}.mlp.down_proj.weight"]

    def add_down(self, l, dW):
        self.W[f"model.layers.{l}.mlp.down_proj.weight"] = self.down(l) + dW

    def forward(self, ids, add=(), rep=()):
        add, rep = dict(add), dict(rep)
        ids = np.asarray(ids, int)
        n = len(ids)
        S = {}

        def at(site, l, x):
            if (site, l) in add:
                x = x + add[site, l]
            if (site, l) in rep:
                pos, v = rep[site, l]
                x = np.broadcast_to(x, (max(len(v), len(x)), *x.shape[1:])).astype(np.result_type(x, v))
                x[:, pos] = v
            S[site, l] = x
            return x

        W, hd = self.W, self.d // self.nh
        h = W["model.embed_tokens.weight"][ids][None]
        mask = np.tril(np.ones((n, n), bool))

        def heads(x, k):
            return x.reshape(len(x), n, k, hd).transpose(0, 2, 1, 3)

        for l in range(self.L):

            def P(s):
                return W[f"model.layers.{l}.{s}.weight"]

            x = rms(h, P("input_layernorm"))
            q, k, v = (
                heads(x @ P(f"self_attn.{a}_proj").T, c) for a, c in (("q", self.nh), ("k", self.nkv), ("v", self.nkv))
            )
            q, k = rot(q, self.cos[:n], self.sin[:n]), rot(k, self.cos[:n], self.sin[:n])
            g = self.nh // self.nkv
            k, v = np.repeat(k, g, 1), np.repeat(v, g, 1)  # query heads 0..g-1 share kv head 0, and so on
            s = q @ k.transpose(0, 1, 3, 2) / np.sqrt(hd)
            e = np.where(mask, np.exp(s - np.where(mask, s.real, -np.inf).max(-1, keepdims=True)), 0)
            o = (e / e.sum(-1, keepdims=True)) @ v
            h = h + at("attn", l, o.transpose(0, 2, 1, 3).reshape(len(o), n, self.d) @ P("self_attn.o_proj").T)
            x = at("ln2", l, rms(h, P("post_attention_layernorm")))
            a = silu(at("gate", l, x @ P("mlp.gate_proj").T)) * at("up", l, x @ P("mlp.up_proj").T)
            h = h + at("mlp", l, at("act", l, a) @ P("mlp.down_proj").T)
            h = at("block", l, h)
        return rms(h, W["model.norm.weight"]) @ W["model.embed_tokens.weight"].T, S

    def logp(self, ids, **kw):
        return logsm(self.forward(ids, **kw)[0])


def cgrad(f, x):
    """value and gradient of f at x; f maps (D, len(x)) to (D,)"""
    y = f(x[None] + 1j * H * np.eye(len(x)))
    return float(y[0].real), y.imag / H


def norm(a):
    return float(np.sqrt((a * a).sum()))


class Adam:  # torch's: no weight decay, betas .9/.999, eps 1e-8 outside the root
    def __init__(self, lr):
        self.lr, self.t, self.m, self.v = lr, 0, 0.0, 0.0

    def step(self, x, g):
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g * g
        return x - self.lr * (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)


def request(inp, r):
    def g(k):
        return inp[f"in_{r}_{k}"].astype(int)

    return {
        "rows": [g("prompt"), g("ctx1"), g("ctx2")],
        "pos": [int(g("p")[0]), int(g("ctx1_p")[0]), int(g("ctx2_p")[0])],
        "kl": g("kl"),
        "klp": int(g("kl_p")[0]),
        "new": g("new"),
        "true": g("true"),
    }


def nll_of(net, prompt, target, **kw):
    """(D,) mean negative log-probability of the target after the prompt, teacher-forced, and whether every target token is the argmax"""
    n, T = len(prompt), len(target)
    lp = net.logp(np.concatenate([prompt, target[:-1]]), **kw)[:, n - 1 : n - 1 + T]
    return -lp[:, np.arange(T), target].mean(1), bool((lp[0].real.argmax(-1) == target).all())


def token_logp(net, prompt, target):
    return net.logp(np.concatenate([prompt, target[:-1]]))[
        0, np.arange(len(prompt) - 1, len(prompt) - 1 + len(target)), target
    ]


# ---------------------------------------------------------------- v* / z search (0.5, 3.1, 3.2)
def z_parts(net, rq, sites):
    """f(X: (D, len(sites)*d)) -> NLL (D,), KL (D,), hit; and the sites' inits"""
    d = net.d

    def adds(n, p, X):
        o = {}
        for j, s in enumerate(sites):
            a = np.zeros((len(X), n, d), X.dtype)
            a[:, p] = X[:, j * d : (j + 1) * d]
            o[s] = a
        return o

    S = net.forward(rq["rows"][0])[1]
    init = [S[s][0, rq["pos"][0]] for s in sites]
    p0 = net.logp(rq["kl"])[0, rq["klp"]]

    def f(X):
        N, hit = [], True
        for row, p in zip(rq["rows"], rq["pos"], strict=False):
            y, h = nll_of(net, row, rq["new"], add=adds(len(row) + len(rq["new"]) - 1, p, X))
            N.append(y)
            hit &= h
        q = net.logp(rq["kl"], add=adds(len(rq["kl"]), rq["klp"], X))[:, rq["klp"]]
        return np.mean(N, 0), (np.exp(q) * (q - p0)).sum(-1), hit

    return f, init


def z_search(net, rq, sites, forwards, lr, wd, clamp, klf, stop, pmet=False, kl_stop=0.01):
    f, init = z_parts(net, rq, sites)
    d, k = net.d, len(sites)
    D = np.zeros(k * d)
    opt = Adam(lr)
    fac = 1.0
    T = {"loss": [], "nll": [], "kl": [], "fac": [], "delta": [], "hit": [], "clamped": []}

    def part(x, j):
        return x[j * d : (j + 1) * d]

    for it in range(forwards):
        N, K, hit = f(D[None])
        N, K = float(N[0]), float(K[0])
        loss = fac * N + klf * K + sum(wd * norm(part(D, j)) / norm(init[j]) ** 2 for j in range(k))
        for a, b in (("loss", loss), ("nll", N), ("kl", K), ("fac", fac), ("delta", D.copy()), ("hit", float(hit))):
            T[a].append(b)
        if loss < stop:
            break
        nxt = fac
        if pmet:
            nxt = 0.1 if hit else 1.0
            if hit and klf * K <= kl_stop:
                break
        if it == forwards - 1:
            break
        g = cgrad(lambda X: (lambda y: fac * y[0] + klf * y[1])(f(X)), D)[1]
        for j in range(k):
            if norm(part(D, j)) > 0:
                part(g, j)[:] += wd * part(D, j) / norm(part(D, j)) / norm(init[j]) ** 2
        D = opt.step(D, g)
        c = 0.0
        for j in range(k):
            if norm(part(D, j)) > clamp * norm(init[j]):
                part(D, j)[:] *= clamp * norm(init[j]) / norm(part(D, j))
                c = 1.0
        T["clamped"].append(c)
        fac = nxt
    T = {a: np.array(b) for a, b in T.items()}
    return [init[j] + part(D, j) for j in range(k)], init, T


# ---------------------------------------------------------------- keys
def keys(net, rq, l):
    return np.array(
        [net.forward(r)[1]["act", l][0, p] for r, p in zip(rq["rows"], rq["pos"], strict=False)]
    )  # one per row, bare first


def group_key(net, rq, l):
    K = keys(net, rq, l)
    return (K[0] + K[1:].mean(0)) / 2


def state(net, rq, site, l):
    return net.forward(rq["rows"][0])[1][site, l][0, rq["pos"][0]]


# ---------------------------------------------------------------- methods
def rome(net, rq, l, C, zs, mean_key):
    (v,), (o0,), T = z_search(net, rq, [("mlp", l)], **zs)
    K = keys(net, rq, l)
    kbar = K.mean(0)
    u = np.linalg.solve(C, kbar)
    u /= norm(u)
    k = kbar if mean_key else K[0]
    right = (v - net.down(l) @ k) / (k @ u)
    return {"v": v, "init": o0, "k0": K[0], "kbar": kbar, "u": u, "right": right, "delta": np.outer(right, u)}, T


def spread(net, rqs, Z, layers, site, share, system):
    """the common layer loop: net is changed in place. system(l, K) gives the (m x n) matrix A of Delta = resid A^T"""
    o = {}
    n = len(layers)
    for j, l in enumerate(layers):
        K = np.array([group_key(net, r, l) for r in rqs]).T
        R = Z - np.array([state(net, r, site, layers[-1]) for r in rqs]).T
        resid = R / share(n - j)
        A = system(l, K)
        o[f"K{l}"], o[f"R{l}"], o[f"left{l}"], o[f"rightT{l}"] = K, R, resid, A
        net.add_down(l, resid @ A.T)
    return o


def memit(net, rqs, layers, lam, Cs, zs, pmet=False):
    net = net.copy()
    sites = [("mlp", layers[-1]), ("attn", layers[-1])] if pmet else [("block", layers[-1])]
    zt = [z_search(net, r, sites, pmet=pmet, **zs) for r in rqs]
    Z = np.array([z[0][0] for z in zt]).T
    o = spread(
        net,
        rqs,
        Z,
        layers,
        sites[0][0],
        np.sqrt if pmet else float,
        lambda l, K: np.linalg.solve(lam * Cs[l] + K @ K.T, K),
    )
    o["Z"] = Z
    if pmet:
        o["z_attn_unused"] = zt[0][0][1]
    return o, [z[2] for z in zt], net


def null_basis(C, share):
    w, U = np.linalg.eigh(C)
    r = int((np.cumsum(w) <= share * w.sum()).sum())
    return U[:, :r]


def alphaedit(net, seq, layers, Cs, share, l2, zs):
    net = net.copy()
    U = {l: null_basis(Cs[l], share) for l in layers}
    M = {l: np.zeros((net.m, net.m)) for l in layers}
    outs = []
    for rq in seq:
        (z,), _, T = z_search(net, rq, [("block", layers[-1])], **zs)

        def system(l, K):
            P = U[l] @ U[l].T
            return np.linalg.solve(P @ (K @ K.T + M[l]) + l2 * np.eye(net.m), P @ K)

        o = spread(net, [rq], z[:, None], layers, "block", float, system)
        o["Z"] = z[:, None]
        for l in layers:
            k = group_key(net, rq, l)
            M[l] = M[l] + np.outer(k, k)
            o[f"k_after{l}"] = k
        outs.append((o, T, net.copy()))
    return outs, U


def ig_scores(net, prompt, truth, points):
    """(tokens, L, m) attributions; also the model's argmax after each prefix"""
    ids = list(prompt)
    al = np.linspace(0, 1, points)
    out = []
    said = []
    for y in truth:
        lg, S = net.forward(ids)
        last = len(ids) - 1
        sc = []
        for l in range(net.L):
            w = S["gate", l][0, last]
            X = (al[:, None, None] * w + 1j * H * np.eye(net.m)).reshape(-1, net.m)
            p = np.exp(logsm(net.forward(ids, rep={("gate", l): (last, X)})[0][:, last]))[:, y]
            sc.append(w * (p.imag / H).reshape(points, net.m).mean(0))
        out.append(sc)
        a = int(lg[0, last].argmax())
        said.append(a)
        ids.append(a)
    return np.array(out), np.array(said)


def greedy(net, prompt, n):
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(net.forward(ids)[0][0, -1].argmax()))
    return np.array(ids[len(prompt) :])


def kn(net, rq, ntok, points, thr, l1, l2):
    att, _ = ig_scores(net, rq["rows"][0], rq["true"][:ntok], points)
    sc = att.mean(0)
    neurons = np.argwhere(sc > thr * sc.max())
    t = rq["new"][:ntok]
    a = greedy(net, rq["rows"][0], ntok)
    E = net.W["model.embed_tokens.weight"]
    o = {"scores": sc, "neurons": neurons.astype(float), "said": a.astype(float)}
    col = np.array([net.down(l)[:, i] for l, i in neurons])
    cn = np.sqrt((col**2).sum(1))[:, None]

    def unit(e):
        return e / norm(e)

    o["cols_authors"] = cn * (l2 * sum(unit(E[x]) for x in t) - l1 * sum(unit(E[x]) for x in a))
    o["step_easyedit"] = sum(E[x] for x in t) - (2 * E[a[0]] if ntok == 1 else sum(E[x] for x in a))
    o["step_E2"] = sum(E[x] for x in t) - 2 * sum(E[x] for x in a)  # E[t] - 2E[a] for every token
    o["step_22"] = 2 * sum(E[x] for x in t) - 2 * sum(E[x] for x in a)
    o["step_paper_unscaled"] = l2 * sum(E[x] for x in t) - l1 * sum(E[x] for x in a)

    def after(step):
        n = net.copy()
        for j, (l, i) in enumerate(neurons):
            D = np.zeros((net.d, net.m))
            D[:, i] = step[j] if step.ndim == 2 else step
            n.add_down(l, D)
        return n

    return o, after


def bag_nll(net, prompt, target, **kw):
    return -net.logp(prompt, **kw)[:, -1][:, target].mean(1)


def down_grad(net, ids, l, f):
    """dL/dW_down of layer l = sum_t g_t x_t^T, g_t = dL/d(output at t) by complex step on an additive perturbation"""
    n, d = len(ids), net.d
    y = f({("mlp", l): (1j * H * np.eye(n * d)).reshape(n * d, n, d)})
    g = (y.imag / H).reshape(n, d)
    return float(y[0].real), g.T @ net.forward(ids)[1]["act", l][0]


def ft(net, rq, l, updates, lr, bag, stop=0.01):
    net = net.copy()
    W0 = net.down(l)
    opt = Adam(lr)
    L = []
    pr = rq["rows"][0]
    ids = pr if bag else np.concatenate([pr, rq["new"][:-1]])
    for _ in range(updates):

        def f(add):
            return bag_nll(net, pr, rq["new"], add=add) if bag else nll_of(net, pr, rq["new"], add=add)[0]

        y, g = down_grad(net, ids, l, f)
        L.append(y)
        if y < stop:
            break
        net.W[f"model.layers.{l}.mlp.down_proj.weight"] = opt.step(net.down(l), g)
    L.append(float((bag_nll(net, pr, rq["new"]) if bag else nll_of(net, pr, rq["new"])[0])[0]))
    return {"delta": net.down(l) - W0, "loss": np.array(L)}, net


def grace(net, rq, l, updates, lr, value):
    pr = rq["rows"][0]
    q = len(pr) - 1
    key = net.forward(pr)[1]["act", l][0, q]
    v = value.copy()
    opt = Adam(lr)
    V, L = [v], []

    def f(X):
        return nll_of(net, pr, rq["new"], rep={("mlp", l): (q, X)})[0]

    for _ in range(updates):
        y, g = cgrad(f, v)
        L.append(y)
        v = opt.step(v, g)
        V.append(v)
    L.append(float(f(v[None])[0]))
    return {"key": key, "values": np.array(V), "loss": np.array(L)}


def mend_factors(net, rq, l):
    ids = np.concatenate([rq["rows"][0], rq["new"][:-1]])
    n = len(ids)
    S = net.forward(ids)[1]
    o = {}
    for name, site, x in (("gate", "gate", "ln2"), ("up", "up", "ln2"), ("down", "mlp", "act")):
        dim = S[site, l].shape[-1]
        y = nll_of(net, rq["rows"][0], rq["new"], add={(site, l): (1j * H * np.eye(n * dim)).reshape(n * dim, n, dim)})[
            0
        ]
        g = (y.imag / H).reshape(n, dim)
        X = S[x, l][0]
        keep = (X != 0).any(1) & (g != 0).any(1)
        o[name] = (X[keep], g[keep])
    return o


def mend(net, rq, l, inp):
    fac = mend_factors(net, rq, l)
    o = {}
    for name, shape, k, r in (("gate", "wide", 0, 0), ("up", "wide", 1, 1), ("down", "narrow", 0, 2)):

        def G(s):
            return inp[f"in_mend_{shape}_{s}"]

        X, g = fac[name]
        z = np.concatenate([(X - G("mu_x")) / (G("sd_x") + 1e-7), (g - G("mu_g")) / (G("sd_g") + 1e-7)], 1)
        for b in (0, 1):
            pre = z @ G(f"V{b}").T @ G(f"U{b}").T + G(f"b{b}")
            z = z + np.maximum(G(f"scale{b}")[k] * pre + G(f"shift{b}")[k], 0)
        xt, gt = z[:, : X.shape[1]], z[:, X.shape[1] :]
        o[f"{name}_x"], o[f"{name}_g"], o[f"{name}_delta"] = X, g, inp["in_mend_rates"][r] * gt.T @ xt
    return o


# ---------------------------------------------------------------- everything
ZS = {"forwards": 9, "lr": 0.5, "wd": 1e-3, "clamp": 4.0, "klf": 0.0625, "stop": 0.05}
SET = {
    "rome_layer": 1,
    "memit_layers": [1, 2],
    "easy_layer": 2,
    "lam": 0.7,
    "alpha_share": 0.4,
    "alpha_l2": 0.5,
    "kn_points": 20,
    "kn_thr": 0.2,
    "kn_l1": 1.0,
    "kn_l2": 8.0,
    "ft_layer": 2,
    "ft_updates": 5,
    "ft_lr": 5e-4,
    "grace_layer": 2,
    "grace_updates": 10,
    "grace_lr": 1.0,
    "mend_layer": 3,
}


def run(inp):
    net = Net(inp)
    A, B = request(inp, "A"), request(inp, "B")
    Cs = [inp[f"in_moment{l}"] for l in range(net.L)]
    O = {}
    s = SET
    ls = s["memit_layers"]

    def put(pre, o):
        for k, v in o.items():
            O[f"out_{pre}_{k}"] = np.asarray(v, float)

    def after(pre, n, names="A"):
        for r in names:
            q = A if r == "A" else B
            put(
                pre,
                {
                    f"logp_new_{r}": token_logp(n, q["rows"][0], q["new"]),
                    f"logp_true_{r}": token_logp(n, q["rows"][0], q["true"]),
                },
            )

    def edited(l, D):
        n = net.copy()
        n.add_down(l, D)
        return n

    put(
        "base",
        {
            "logits_A": net.forward(A["rows"][0])[0][0],
            "logits_A_ctx2": net.forward(A["rows"][2])[0][0][-2:],
            "keys_A_l1": keys(net, A, 1),
        },
    )
    after("base", net, "AB")
    for pre, mean in (("rome", False), ("rrome", True)):
        o, T = rome(net, A, s["rome_layer"], Cs[s["rome_layer"]], ZS, mean)
        put(pre, o)
        after(pre, edited(s["rome_layer"], o["delta"]))
        if not mean:
            put(pre + "_trace", T)
    o, T = rome(net, A, s["rome_layer"], Cs[s["rome_layer"]], dict(ZS, clamp=0.75), False)
    o.pop("delta")
    put("rome_clamp075", o)
    put("rome_clamp075_trace", {k: T[k] for k in ("loss", "nll", "kl", "clamped")})
    o, T, n = memit(net, [A], ls, s["lam"], Cs, ZS)
    put("memit", o)
    put("memit_trace", T[0])
    after("memit", n)
    o, T, n = memit(net, [A, B], ls, s["lam"], Cs, ZS)
    put("memit2", o)
    after("memit2", n, "AB")
    o, T, n = memit(net, [A], ls, s["lam"], Cs, ZS, pmet=True)
    put("pmet", o)
    put("pmet_trace", T[0])
    after("pmet", n)
    E = request(inp, "C")
    for pre, site, kw, pm in (
        ("rome", ["mlp"], {"forwards": 25, "klf": 0.0}, False),
        ("pmet", ["mlp", "attn"], {"forwards": 9}, True),
        ("pmet_klstop", ["mlp", "attn"], {"forwards": 9, "klf": 0.002}, True),
    ):
        z, _, T = z_search(net, E, [(x, s["easy_layer"]) for x in site], pmet=pm, **dict(ZS, **kw))
        T.pop("delta")
        put("easy_" + pre, dict(T, z=z))
    outs, U = alphaedit(net, [A, B], ls, Cs, s["alpha_share"], s["alpha_l2"], ZS)
    for l in ls:
        put("alpha", {f"rank{l}": U[l].shape[1]})
    for i, (o, T, n) in enumerate(outs):
        put(f"alpha_edit{i + 1}", o)
        put(f"alpha_edit{i + 1}_trace", {k: T[k] for k in ("loss", "nll", "kl")})
        after(f"alpha_edit{i + 1}", n, "AB")
    for nt in (1, 2):
        o, aft = kn(net, A, nt, s["kn_points"], s["kn_thr"], s["kn_l1"], s["kn_l2"])
        put(f"kn{nt}", o)
        for rule in ("cols_authors", "step_easyedit", "step_E2", "step_22", "step_paper_unscaled"):
            after(f"kn{nt}_{rule}", aft(o[rule]))
    for pre, bag in (("ftm", False), ("ftl", True)):
        o, n = ft(net, A, s["ft_layer"], s["ft_updates"], s["ft_lr"], bag)
        put(pre, o)
        after(pre, n)
    put("grace", grace(net, A, s["grace_layer"], s["grace_updates"], s["grace_lr"], inp["in_grace_value"]))
    put("mend", mend(net, A, s["mend_layer"], inp))
    n = net.copy()
    l = s["mend_layer"]
    for k in ("gate", "up", "down"):
        w = f"model.layers.{l}.mlp.{k}_proj.weight"
        n.W[w] = n.W[w] + O[f"out_mend_{k}_delta"]
    after("mend", n)
    return O


def tests(inp):
    net = Net(inp)
    A, B = request(inp, "A"), request(inp, "B")
    Cs = [inp[f"in_moment{l}"] for l in range(4)]
    rng = np.random.default_rng(0)

    def rel(a, b):
        return float(np.abs(a - b).max() / np.abs(b).max())

    def say(t, x):
        return print(f"{t:70s} {x:.2e}")

    def fd(f, x, h=1e-5):  # 4th-order central differences
        g = []
        for i in range(len(x)):
            e = np.zeros(len(x))
            e[i] = h
            g.append((8 * (f(x + e) - f(x - e)) - (f(x + 2 * e) - f(x - 2 * e))) / (12 * h))
        return np.array(g)

    for nm, sites in (("mlp 1", [("mlp", 1)]), ("block 2", [("block", 2)]), ("mlp+attn 2", [("mlp", 2), ("attn", 2)])):
        f, _ = z_parts(net, A, sites)
        x = rng.standard_normal(32 * len(sites))

        def F(X):
            return f(X)[0] + 0.0625 * f(X)[1]

        say(
            f"z gradient, {nm}: complex step vs differences",
            rel(cgrad(F, x)[1], fd(lambda v: float(F(v[None])[0]), x, 1e-3)),
        )
    pr = A["rows"][0]
    for bag in (False, True):
        g = down_grad(
            net,
            pr if bag else np.concatenate([pr, A["new"][:-1]]),
            2,
            lambda a: bag_nll(net, pr, A["new"], add=a) if bag else nll_of(net, pr, A["new"], add=a)[0],
        )[1]
        D = rng.standard_normal((32, 48))

        def L(t):
            n = net.copy()
            n.add_down(2, t[0] * D)
            return float((bag_nll(n, pr, A["new"]) if bag else nll_of(n, pr, A["new"])[0])[0])

        say(
            f"FT-{'L' if bag else 'M'} weight gradient along a random direction vs differences",
            abs((g * D).sum() / fd(L, np.zeros(1), 1e-4)[0] - 1),
        )
    fac = mend_factors(net, A, 3)
    for k in fac:
        D = rng.standard_normal((fac[k][1].shape[1], fac[k][0].shape[1]))
        w = f"model.layers.3.mlp.{k}_proj.weight"

        def L(t):
            n = net.copy()
            n.W[w] = n.W[w] + t[0] * D
            return float(nll_of(n, pr, A["new"])[0][0])

        say(
            f"MEND factors of {k} ({len(fac[k][0])} rows kept): sum g x^T vs differences",
            abs(((fac[k][1].T @ fac[k][0]) * D).sum() / fd(L, np.zeros(1), 1e-4)[0] - 1),
        )
    o, _ = rome(net, A, 1, Cs[1], ZS, False)
    say("ROME: (W + D) k0 = v*", rel((net.down(1) + o["delta"]) @ o["k0"], o["v"]))
    kb = np.linalg.inv(Cs[1]) @ o["kbar"]
    say(
        "ROME: closed form with C^-1 kbar un-normalised",
        rel(np.outer(o["v"] - net.down(1) @ o["k0"], kb) / (o["k0"] @ kb), o["delta"]),
    )
    r, _ = rome(net, A, 1, Cs[1], ZS, True)
    say("R-ROME: (W + D) kbar = v*", rel((net.down(1) + r["delta"]) @ r["kbar"], r["v"]))
    print(
        "ROME k0.u / kbar.u / cos(k0, kbar)",
        o["k0"] @ o["u"],
        o["kbar"] @ o["u"],
        o["k0"] @ o["kbar"] / norm(o["k0"]) / norm(o["kbar"]),
    )
    m, _, _n1 = memit(net, [A, B], [1, 2], 0.7, Cs, ZS)
    for l in (1, 2):
        K = m[f"K{l}"]
        G = np.linalg.inv(0.7 * Cs[l]) @ K
        say(f"MEMIT layer {l}: A vs Woodbury", rel(G @ np.linalg.inv(np.eye(2) + K.T @ G), m[f"rightT{l}"]))
        big = np.vstack([np.sqrt(0.7) * np.linalg.cholesky(Cs[l]).T, K.T])
        rhs = np.vstack([np.zeros((48, 32)), m[f"left{l}"].T])  # least squares min |D K - resid|^2 + lam tr(D C D^T)
        say(
            f"MEMIT layer {l}: update vs least squares",
            rel(np.linalg.lstsq(big, rhs, rcond=None)[0].T, m[f"left{l}"] @ m[f"rightT{l}"].T),
        )
    al, U = alphaedit(net, [A, B], [1, 2], Cs, 0.4, 0.5, ZS)
    for l in (1, 2):
        k1 = al[0][0][f"k_after{l}"]
        K = al[1][0][f"K{l}"]
        u = U[l]
        Y = np.linalg.solve(u.T @ (K @ K.T + np.outer(k1, k1)) @ u + 0.5 * np.eye(u.shape[1]), u.T @ K)
        say(f"AlphaEdit edit 2 layer {l}: r x r form", rel(u @ Y, al[1][0][f"rightT{l}"]))
        Y0 = np.linalg.solve(u.T @ (K @ K.T) @ u + 0.5 * np.eye(u.shape[1]), u.T @ K)
        print("   without M it would differ by", rel(u @ Y0, al[1][0][f"rightT{l}"]))
        w = np.linalg.eigvalsh(Cs[l])
        cs = np.cumsum(w) / w.sum()
        r_ = u.shape[1]
        print("   rank", r_, "share held", cs[r_ - 1], "with one more", cs[r_])
    att, _said = ig_scores(net, pr, A["true"], 20)
    big, _ = ig_scores(net, pr, A["true"][:1], 2001)
    _lg, S = net.forward(pr)
    y = A["true"][0]
    for l in range(4):
        w = S["gate", l][0, -1]

        def P(a):
            return float(np.exp(logsm(net.forward(pr, rep={("gate", l): (len(pr) - 1, (a * w)[None])})[0][0, -1])[y]))

        def X(v):
            return float(np.exp(logsm(net.forward(pr, rep={("gate", l): (len(pr) - 1, v[None])})[0][0, -1])[y]))

        print(
            f"IG layer {l}: sum of scores {att[0, l].sum():.6f} (2001 points {big[0, l].sum():.6f})  P(1)-P(0) = {P(1) - P(0):.6f}"
        )
        if l == 1:
            ref = w * np.mean([fd(X, a * w, 1e-3) for a in np.linspace(0, 1, 20)], 0)
            say("IG scores layer 1 vs differences", rel(att[0, 1], ref))
    for nt in (1, 2):
        sc = att[:nt].mean(0)
        r = np.sort((sc / sc.max()).ravel())[::-1]
        i = int((r > 0.2).sum())
        print(f"KN {nt} token(s): {i} neurons, ratios about the threshold {r[i - 1]:.4f} {r[i]:.4f}")
    gr = grace(net, A, 2, 10, 1.0, inp["in_grace_value"])
    v = gr["values"][3]

    def f(X):
        return nll_of(net, pr, A["new"], rep={("mlp", 2): (len(pr) - 1, X)})[0]

    say("GRACE gradient vs differences", rel(cgrad(f, v)[1], fd(lambda x: float(f(x[None])[0]), v, 1e-3)))


if __name__ == "__main__":
    D = os.path.join(HERE, "derivation.npz")
    if "--write" in sys.argv:
        inp = {k: v for k, v in np.load(D).items() if not k.startswith("out_")}
        for k, v in ZS.items():
            inp[f"in_set_z_{k}"] = np.array(float(v))
        for k, v in SET.items():
            inp[f"in_set_{k}"] = np.array(v, float)
        np.savez_compressed(D, **inp, **run(inp))
    else:
        f = dict(np.load(D))
        inp = {k: v for k, v in f.items() if not k.startswith("out_")}
        if "--test" in sys.argv:
            tests(inp)
        else:
            O = run(inp)
            assert set(O) == {k for k in f if k.startswith("out_")}
            w = max((float(np.abs(O[k] - f[k]).max() / (np.abs(f[k]).max() + 1e-300)), k) for k in O)
            print(len(O), "outputs; worst relative difference", w)
