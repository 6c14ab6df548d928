"""The golden values of preference objectives: make_preference.py FIXTURES, which holds `llama` of make_fixtures.py

Needs trl 1.16.0 besides (and datasets, accelerate). Written are FIXTURES/llama/preference/: pairs.json and rated.json
(the data, as token ids), cases.json (the loss of every case) and reference.safetensors (the log-probabilities and, for
every case, the slope of each adapter tensor). The policy is `llama` with adapters/lora, the reference model is the same
with the adapter disabled, both in float64. The losses and slopes come from TRL's own trainers; a plain formula beside
each must give the same, and stands alone ("paper") where TRL has another objective than the paper.

A loss is the mean over the batch, which is all of pairs.json or of rated.json. With c and r for chosen and rejected:
lp is the sum over the answer's tokens of the policy's log-probability, ref that of the reference model, n the number of
the answer's tokens (no EOS is added), ratio = lp - ref, m = lp / n."""
import inspect, json, os, sys, tempfile, textwrap
from types import SimpleNamespace
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
import datasets
import torch
import torch.nn.functional as F
import transformers as tf
import trl
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.models.llama import modeling_llama
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer, orpo_trainer
from trl.kernels import chunked_logprob
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, reward_trainer, utils
from trl import DPOConfig, DPOTrainer, GRPOTrainer, KTOConfig, KTOTrainer, RewardTrainer

assert trl.__version__ == "1.16.0", trl.__version__
torch.set_num_threads(1)
tf.utils.logging.set_verbosity_error()
tf.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
datasets.disable_caching()


def widen(owner, name, module):
    """The same code, with float64 where its text asks for float32."""
    text = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    for narrow, wide in (("torch.float32", "torch.float64"), ("torch.float)", "torch.float64)"), (".float()", ".double()")):
        text = text.replace(narrow, wide)
    made = {}
    exec(text, vars(module), made)
    setattr(owner, name, made[name])


# The norms, the angles of RoPE (whose frequencies stay rounded to float32), TRL's fused head, and its odds ratio.
widen(modeling_llama.LlamaRMSNorm, "forward", modeling_llama)
widen(modeling_llama.LlamaRotaryEmbedding, "forward", modeling_llama)
for name in ("_addmm_fp32", "_forward_tile", "_backward_tile", "ChunkedLogProbFunction"):
    widen(chunked_logprob, name, chunked_logprob)
utils._ChunkedLogProbFunction = chunked_logprob.ChunkedLogProbFunction
widen(ORPOTrainer, "odds_ratio_loss", orpo_trainer)


# TRL makes its batches from text: here a text is the token ids in decimal, and the EOS that TRL adds is dropped.
def ids_of_text(_, text, **__):
    return {"input_ids": [int(i) for i in text.replace("<|im_end|>", "").split()]}


def text_of_ids(row):
    return {n: v if isinstance(v, bool) else "".join(f"{i} " for i in v) for n, v in row.items()}


dpo_trainer._tokenize = kto_trainer._tokenize = ids_of_text

folder = os.path.join(sys.argv[1], "llama")
adapter = os.path.join(folder, "adapters", "lora")
out = os.path.join(folder, "preference")
os.makedirs(out, exist_ok=True)
scratch = tempfile.TemporaryDirectory()
tokenizer = tf.AutoTokenizer.from_pretrained(folder)

g = torch.Generator().manual_seed(16)


def some_ids():                           # the first five ids are special tokens
    return torch.randint(5, 320, (int(torch.randint(3, 13, (1,), generator=g)),), generator=g).tolist()


pairs = [{n: some_ids() for n in ("prompt", "chosen", "rejected")} for _ in range(4)]
rated = [dict(prompt=some_ids(), completion=some_ids(), label=label) for label in (True, False, True, True, False, True)]
# KTO's KL sequences are a prompt with the answer of the row before it, the first prompt with the batch's last answer.
kl_rows = [dict(row, completion=rated[i - 1]["completion"]) for i, row in enumerate(rated)]


def trainer(kind, config, rows, **arguments):
    """A trainer of TRL over the policy. Given the base and a new adapter, it takes the base for the reference model;
    given a PeftModel, it would take a copy of the adapter."""
    base = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    peft_config = LoraConfig.from_pretrained(adapter)
    peft_config.inference_mode = False
    args = config(scratch.name, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                  per_device_train_batch_size=len(rows), **arguments)
    made = kind(model=base, args=args, processing_class=tokenizer, peft_config=peft_config,
                train_dataset=datasets.Dataset.from_list([text_of_ids(r) for r in rows]))
    loaded = set_peft_model_state_dict(made.model, load_file(os.path.join(adapter, "adapter_model.safetensors")))
    assert not loaded.unexpected_keys
    assert all(p.dtype == torch.float64 for p in made.model.parameters())
    made.model.eval()
    return made


def slopes(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n.replace(".default", ""): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


KEPT = ("rewards/", "logps/", "kl", "nll_loss", "log_odds")


def metrics_of(found):
    return {n: sum(v) / len(v) for n, v in found.items() if n.startswith(KEPT)}


def dpo(one_by_one=False, **arguments):
    t = trainer(DPOTrainer, DPOConfig, pairs, **arguments)
    rows = list(t.train_dataset)
    batches = [[r] for r in rows] if one_by_one else [rows]
    loss = sum(t.compute_loss(t.model, t.data_collator(b)) for b in batches) / len(batches)
    return loss, slopes(t.model, loss), metrics_of(t._metrics["eval"])


def kto(rows=rated, **arguments):
    t = trainer(KTOTrainer, KTOConfig, rows, **arguments)
    loss = t.compute_loss(t.model, t.data_collator(list(t.train_dataset)))
    return loss, slopes(t.model, loss), metrics_of(t._metrics["eval"])


def without_reference(kind, config, **arguments):
    """ORPO and CPO, whose tokenization adds BOS and EOS: their batch is made here from the token ids."""
    t = trainer(kind, config, pairs, remove_unused_columns=False, max_length=64, **arguments)
    rows = []
    for pair in pairs:
        row = {}
        for side in ("chosen", "rejected"):
            row[side + "_input_ids"] = pair["prompt"] + pair[side]
            row[side + "_attention_mask"] = [1] * len(row[side + "_input_ids"])
            row[side + "_labels"] = [-100] * len(pair["prompt"]) + pair[side]
        rows.append(row)
    loss = t.compute_loss(t.model, t.data_collator(rows))
    return loss, slopes(t.model, loss), metrics_of(t._stored_metrics["train"])


# The plain formulas, over a model that runs each sequence by itself.
plain = trainer(DPOTrainer, DPOConfig, pairs).model


def token_logps(prompt, answer, prompt_too=False):
    ids = torch.tensor([prompt + answer])
    logps = plain(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    return logps if prompt_too else logps[len(prompt) - 1:]


def sums(rows, answer):
    return torch.stack([token_logps(r["prompt"], r[answer]).sum() for r in rows])


def under_both(rows, answer):
    policy = sums(rows, answer)
    with torch.no_grad(), plain.disable_adapter():
        return policy, sums(rows, answer)


def quantities():
    q = SimpleNamespace()
    q.lp_c, q.ref_c = under_both(pairs, "chosen")
    q.lp_r, q.ref_r = under_both(pairs, "rejected")
    q.n_c, q.n_r = (torch.tensor([len(p[n]) for p in pairs]) for n in ("chosen", "rejected"))
    q.c, q.r = q.lp_c - q.ref_c, q.lp_r - q.ref_r
    q.m_c, q.m_r = q.lp_c / q.n_c, q.lp_r / q.n_r
    q.lp_rated, q.ref_rated = under_both(rated, "completion")
    q.lp_kl, q.ref_kl = under_both(kl_rows, "completion")
    q.rated = q.lp_rated - q.ref_rated
    return q


ls, sg = F.logsigmoid, torch.sigmoid
label = torch.tensor([r["label"] for r in rated])


def odds_ratio(q):
    log_odds = lambda m: m - torch.log1p(-m.exp())
    return log_odds(q.m_c) - log_odds(q.m_r)


def nll_of_all_tokens():
    """TRL's part of ORPO: the chosen sequences with their prompts (without the first token, which nothing predicts),
    one mean over all tokens of the batch."""
    return -torch.cat([token_logps(p["prompt"], p["chosen"], prompt_too=True) for p in pairs]).mean()


def kto_plain(q, beta, desirable_weight, undesirable_weight, rows=None):
    """z0, the KL, is one number for the batch: the mean of its rows, clamped at 0 after the mean, not differentiated."""
    ratio, wanted, kl = q.rated, label, q.lp_kl - q.ref_kl
    if rows:
        ratio, wanted = ratio[rows], label[rows]
        moved = [dict(rated[r], completion=rated[rows[i - 1]]["completion"]) for i, r in enumerate(rows)]
        kl = torch.sub(*under_both(moved, "completion"))
    z0 = kl.mean().clamp(min=0).detach()
    good, bad = 1 - sg(beta * (ratio - z0)), 1 - sg(beta * (z0 - ratio))
    return torch.where(wanted, desirable_weight * good, undesirable_weight * bad).mean()


def kto_apo_plain(q, beta, desirable_weight, undesirable_weight):
    good, bad = 1 - sg(beta * q.rated), sg(beta * q.rated)
    return torch.where(label, desirable_weight * good, undesirable_weight * bad).mean()


def smooth(x, e):
    return -(1 - e) * ls(x) - e * ls(-x)


B, S = 0.1, 0.1
WEIGHTS = dict(beta=B, desirable_weight=1.0, undesirable_weight=1.33)
# Rows whose KL is negative, and so counts as 0.
CLAMPED = [1, 3, 4]
# name, hyperparameters, TRL's call or None, the plain formula, its text.
CASES = [
    ("dpo_sigmoid", dict(beta=B), lambda: dpo(loss_type="sigmoid", beta=B),
     lambda q: -ls(B * (q.c - q.r)).mean(), "-logsigmoid(beta * (ratio_c - ratio_r))"),
    # TRL's `sigmoid` ignores label_smoothing. Its `aot` smooths; it sorts the batch first, which does nothing to one pair.
    ("dpo_smooth", dict(beta=B, label_smoothing=S),
     lambda: dpo(one_by_one=True, loss_type="aot", beta=B, label_smoothing=S), lambda q: smooth(B * (q.c - q.r), S).mean(),
     "x = beta * (ratio_c - ratio_r); -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)"
     " (TRL's loss_type sigmoid ignores label_smoothing; this is its aot, each pair as a batch)"),
    ("dpo_hinge", dict(beta=B), lambda: dpo(loss_type="hinge", beta=B),
     lambda q: torch.relu(1 - B * (q.c - q.r)).mean(), "max(0, 1 - beta * (ratio_c - ratio_r))"),
    # Two of the pairs are past the hinge.
    ("dpo_hinge_flat", dict(beta=1.0), lambda: dpo(loss_type="hinge", beta=1.0),
     lambda q: torch.relu(1 - (q.c - q.r)).mean(), "max(0, 1 - beta * (ratio_c - ratio_r))"),
    # TRL averages over the answer's tokens here; the paper sums.
    ("dpo_ipo", dict(beta=B), lambda: dpo(loss_type="ipo", beta=B),
     lambda q: ((q.c / q.n_c - q.r / q.n_r - 1 / (2 * B)) ** 2).mean(),
     "(ratio_c / n_c - ratio_r / n_r - 1 / (2 * beta))^2 (averaged over the answer's tokens)"),
    ("dpo_sigmoid_norm", dict(beta=B), lambda: dpo(loss_type="sigmoid_norm", beta=B),
     lambda q: -ls(B * (q.c / q.n_c - q.r / q.n_r)).mean(), "-logsigmoid(beta * (ratio_c / n_c - ratio_r / n_r))"),
    ("dpo_robust", dict(beta=B, label_smoothing=S), lambda: dpo(loss_type="robust", beta=B, label_smoothing=S),
     lambda q: ((-(1 - S) * ls(B * (q.c - q.r)) + S * ls(-B * (q.c - q.r))) / (1 - 2 * S)).mean(),
     "x = beta * (ratio_c - ratio_r); (-(1 - label_smoothing) * logsigmoid(x) + label_smoothing * logsigmoid(-x))"
     " / (1 - 2 * label_smoothing)"),
    ("dpo_apo_zero", dict(beta=B), lambda: dpo(loss_type="apo_zero", beta=B),
     lambda q: (1 - sg(B * q.c) + sg(B * q.r)).mean(), "1 - sigmoid(beta * ratio_c) + sigmoid(beta * ratio_r)"),
    ("dpo_apo_down", dict(beta=B), lambda: dpo(loss_type="apo_down", beta=B),
     lambda q: (sg(B * q.c) + 1 - sg(B * (q.c - q.r))).mean(),
     "sigmoid(beta * ratio_c) + 1 - sigmoid(beta * (ratio_c - ratio_r))"),
    ("orpo", dict(beta=B), None, lambda q: (-q.m_c - B * ls(odds_ratio(q))).mean(),
     "-m_c - beta * logsigmoid(log(p_c / (1 - p_c)) - log(p_r / (1 - p_r))), p = exp(m)"),
    ("orpo_trl", dict(beta=B), lambda: without_reference(ORPOTrainer, ORPOConfig, beta=B),
     lambda q: nll_of_all_tokens() - B * ls(odds_ratio(q)).mean(),
     "as orpo, but in place of -m_c the mean over all tokens of the batch's chosen sequences, prompts included, of"
     " -log-probability"),
    # TRL's default would add the mean NLL of the chosen (cpo_alpha 1); SimPO has none.
    ("simpo", dict(beta=2.0, gamma=1.0, gamma_beta_ratio=0.5),
     lambda: without_reference(CPOTrainer, CPOConfig, loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0),
     lambda q: -ls(2.0 * (q.m_c - q.m_r) - 1.0).mean(), "-logsigmoid(beta * (m_c - m_r) - gamma)"),
    ("kto", WEIGHTS, lambda: kto(loss_type="kto", **WEIGHTS), lambda q: kto_plain(q, **WEIGHTS),
     "z0 = max(0, mean of ratio_kl), held fixed; desirable: desirable_weight * (1 - sigmoid(beta * (ratio - z0))),"
     " undesirable: undesirable_weight * (1 - sigmoid(beta * (z0 - ratio)))"),
    ("kto_clamped", dict(WEIGHTS, rows=CLAMPED), lambda: kto([rated[i] for i in CLAMPED], loss_type="kto", **WEIGHTS),
     lambda q: kto_plain(q, **WEIGHTS, rows=CLAMPED),
     "as kto, over these rows of rated.json alone, whose mean of ratio_kl is negative"),
    ("kto_apo", WEIGHTS, lambda: kto(loss_type="apo_zero_unpaired", **WEIGHTS), lambda q: kto_apo_plain(q, **WEIGHTS),
     "desirable: desirable_weight * (1 - sigmoid(beta * ratio)), undesirable: undesirable_weight * sigmoid(beta * ratio)"),
]


def same(a, b, what):
    assert a.dtype == b.dtype == torch.float64 and torch.allclose(a, b, rtol=0, atol=1e-10), what


q = quantities()
tensors = {}
for who, prefix in (("policy", "lp"), ("reference", "ref")):
    for long, short in (("chosen", "c"), ("rejected", "r"), ("rated", "rated"), ("kl", "kl")):
        tensors[f"logps.{who}.{long}"] = getattr(q, f"{prefix}_{short}").detach()
cases = []
for name, parameters, of_trl, formula, text in CASES:
    loss = formula(quantities())
    grads = slopes(plain, loss)
    case = dict(name=name, source="TRL" if of_trl else "paper", hyperparameters=parameters, formula=text)
    if of_trl:
        trl_loss, trl_grads, case["metrics"] = of_trl()
        same(trl_loss, loss, name)
        assert trl_grads.keys() == grads.keys()
        for n in grads:
            same(trl_grads[n], grads[n], name + " " + n)
        loss, grads = trl_loss, trl_grads
    case["loss"] = loss.item()
    cases.append(case)
    tensors.update({f"{name}.grad.{n}": t for n, t in grads.items()})

# TRL's log-probabilities, and its KL, are those of the plain model.
by_name = {c["name"]: c for c in cases}
for n, t in (("logps/chosen", q.lp_c), ("logps/rejected", q.lp_r)):
    assert abs(by_name["dpo_sigmoid"]["metrics"][n] - t.mean().item()) < 1e-10
assert abs(by_name["kto"]["metrics"]["kl"] - (q.lp_kl - q.ref_kl).mean().item()) < 1e-10 and by_name["kto"]["metrics"]["kl"] > 0
assert 0 < (q.c - q.r > 1).sum() < len(pairs)
assert by_name["kto_clamped"]["metrics"]["kl"] == 0

# A reward model's loss, of scores that are given; the slopes are those of the scores.
scores = torch.tensor([1.2, -0.4, 0.3, 2.5, -1.0], dtype=torch.float64), torch.tensor([0.7, 0.1, -1.9, 2.5, 3.0], dtype=torch.float64)
tensors["scores.chosen"], tensors["scores.rejected"] = scores
for name, coefficient in (("reward", 0.0), ("reward_centered", 0.01)):
    c, r = (s.clone().requires_grad_() for s in scores)
    one = SimpleNamespace(model=torch.nn.Identity().eval(), args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
                          accelerator=SimpleNamespace(gather=lambda t: t, gather_for_metrics=lambda t: t),
                          _metrics={"eval": reward_trainer.defaultdict(list)}, _total_train_tokens=0)
    loss = RewardTrainer.compute_loss(one, lambda **_: SimpleNamespace(logits=torch.cat([c, r])[:, None]), {})
    same(loss, -ls(c - r).mean() + coefficient * ((c + r) ** 2).mean(), name)
    loss.backward()
    tensors[f"{name}.grad.scores.chosen"], tensors[f"{name}.grad.scores.rejected"] = c.grad, r.grad
    cases.append(dict(name=name, source="TRL", hyperparameters=dict(center_rewards_coefficient=coefficient),
                      formula="-logsigmoid(score_c - score_r) + center_rewards_coefficient * (score_c + score_r)^2",
                      metrics={n: one._metrics["eval"][n][0] for n in ("accuracy", "margin")}, loss=loss.item()))

# GRPO over answers that are given: both of each pair are a group. The model that wrote them was another one, so that
# some ratios are out of bounds; `old` and the rewards are given, the advantages come from the rewards.
answers = [(p["prompt"], p[n]) for p in pairs for n in ("chosen", "rejected")]
rewards = torch.tensor([1.0, 0.0, 0.25, 0.75, 0.5, 0.5, -1.0, 2.0], dtype=torch.float64)
grouped = rewards.view(-1, 2)
advantages = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).view(-1)
mask = torch.zeros(len(answers), max(len(a) for _, a in answers), dtype=torch.long)
for i, (_, a) in enumerate(answers):
    mask[i, :len(a)] = 1


def padded():
    rows = [F.pad(token_logps(*a), (0, mask.shape[1] - len(a[1]))) for a in answers]
    return torch.stack(rows)


with torch.no_grad():
    old = padded() + 0.4 * torch.randn(mask.shape, generator=g, dtype=torch.float64) * mask
    with plain.disable_adapter():
        of_base = padded()
tensors["grpo.rewards"], tensors["grpo.advantages"] = rewards, advantages
tensors["grpo.old"], tensors["grpo.reference"] = (torch.cat([t[i, :len(a)] for i, (_, a) in enumerate(answers)]) for t in (old, of_base))
MOST = 16


def of_trl(loss_type, beta, epsilon_low, epsilon_high, given):
    found = dict(eval=grpo_trainer.defaultdict(list))
    one = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded(), torch.zeros(mask.shape, dtype=torch.float64), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t), _metrics=found,
        model=SimpleNamespace(training=False), args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token",
        use_vllm=False, _entropy_bonus_enabled=False, max_completion_length=MOST, loss_type=loss_type, beta=beta,
        epsilon_low=epsilon_low, epsilon_high=epsilon_high)
    inputs = dict(prompt_ids=mask[:, :1], prompt_mask=mask[:, :1], completion_ids=mask, completion_mask=mask,
                  advantages=advantages, ref_per_token_logps=of_base, num_items_in_batch=mask.sum())
    inputs.update(dict(old_per_token_logps=old) if given else {})
    loss = GRPOTrainer._compute_loss(one, plain, inputs)
    return loss, {n: found["eval"][n][0] for n in ("kl", "clip_ratio/region_mean") if found["eval"][n]}


for name, loss_type, beta, low, high, given in (
        ("grpo", "grpo", 0.04, 0.2, 0.2, True), ("grpo_dapo", "dapo", 0.0, 0.2, 0.28, True),
        ("grpo_dr", "dr_grpo", 0.1, 0.2, 0.2, True), ("grpo_first", "dapo", 0.04, 0.2, 0.2, False)):
    loss, metrics = of_trl(loss_type, beta, low, high, given)
    case = dict(name=name, source="TRL", metrics=metrics, loss=loss.item(), formula=(
        "a = advantage; min(r * a, clamp(r, 1 - low, 1 + high) * a) with r = exp(logp - old), less beta * (exp(d) - d - 1) with"
        " d = reference - logp; its negative, averaged over tokens"),
        hyperparameters=dict(average=loss_type, beta=beta, low=low, high=high, old=given, max_completion_length=MOST))
    assert not given or metrics["clip_ratio/region_mean"] > 0, metrics
    cases.append(case)
    tensors.update({f"{name}.grad.{n}": t for n, t in slopes(plain, loss).items()})

for file, rows in (("pairs.json", pairs), ("rated.json", rated)):
    with open(os.path.join(out, file), "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
with open(os.path.join(out, "cases.json"), "w") as f:
    json.dump(cases, f, indent=1)
    f.write("\n")
assert all(t.dtype == torch.float64 for t in tensors.values())
save_file({n: t.contiguous() for n, t in tensors.items()}, os.path.join(out, "reference.safetensors"))
for case in cases:
    print(case["name"], case["source"], case["loss"], {n: round(v, 6) for n, v in case.get("metrics", {}).items()})
