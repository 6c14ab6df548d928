"""The part of the golden fixtures that classifies: tiny random encoders and decoders with a classification head, PEFT
adapters of task type SEQ_CLS over them, and what transformers + PEFT compute with both. `make_fixtures.py` calls it.
"""
import json, os, shutil
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model, PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, decoders, trainers, processors

VOCAB = 320
NAMES = ["negative", "neutral", "positive"]

# What the tokenizers learn; the tests write their texts with the same words.
SUBJECTS = "the film|the story|the music|the actor|the ending|the plot|the food|the room|the service|the book".split("|")
GOOD = "wonderful lovely bright superb charming delightful brilliant excellent warm perfect".split()
BAD = "awful dreadful boring terrible clumsy dull horrible tedious cold broken".split()
PLAIN = "was is seems and but not very really quite a bit today again here there with for of in it they we".split()


def checkpoints(h):
    """name -> (config, adapter variants); `h` is the hidden size."""
    encoder = dict(vocab_size=VOCAB, hidden_size=h, intermediate_size=2 * h, num_hidden_layers=2, num_attention_heads=4,
                   max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    decoder = dict(vocab_size=VOCAB, hidden_size=h, intermediate_size=2 * h, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    names = dict(id2label=dict(enumerate(NAMES)), label2id={n: i for i, n in enumerate(NAMES)})
    roberta = dict(encoder, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return {
        "bert": (tf.BertConfig(**encoder, **names, pad_token_id=0), list(VARIANTS)),
        "bert_regression": (tf.BertConfig(**encoder, num_labels=1, pad_token_id=0), ["lora"]),
        "roberta": (tf.RobertaConfig(**roberta, **names), ["lora", "all_linear", "dora"]),
        "roberta_multi": (tf.RobertaConfig(**roberta, **names, problem_type="multi_label_classification"), ["lora"]),
        "llama": (tf.LlamaConfig(**decoder, **names), ["lora", "all_linear"]),
        "qwen2_tied": (tf.Qwen2Config(**decoder, **names, tie_word_embeddings=True), ["lora"]),
    }


VARIANTS = {
    "lora": dict(r=4, lora_alpha=8),
    "all_linear": dict(r=4, lora_alpha=16, target_modules="all-linear"),
    "rslora": dict(r=8, lora_alpha=16, use_rslora=True),
    "dora": dict(r=4, lora_alpha=8, use_dora=True),
    "pissa": dict(r=4, lora_alpha=4, init_lora_weights="pissa"),
    "embedding": dict(r=4, lora_alpha=8, target_modules=["word_embeddings", "query"]),
    "bias_all": dict(r=4, lora_alpha=8, bias="all"),
    "pooler_saved": dict(r=4, lora_alpha=8, modules_to_save=["pooler"]),
}


def batch(name, cfg, seed):
    """Three texts of different lengths, padded on the right; the last part of each is its second text."""
    g = torch.Generator().manual_seed(seed)
    lengths, seconds = [24, 17, 9], [8, 0, 4]
    ids = torch.randint(5, VOCAB, (3, 24), generator=g)
    mask, types = torch.ones_like(ids), torch.zeros_like(ids)
    for i, (n, second) in enumerate(zip(lengths, seconds)):
        mask[i, n:] = 0
        ids[i, n:] = cfg.pad_token_id
        if second:
            types[i, n - second:n] = 1
    labels = {"bert_regression": torch.tensor([0.5, -1.0, 2.0]),
              "roberta_multi": torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])}
    out = dict(input_ids=ids, attention_mask=mask, labels=labels.get(name, torch.tensor([2, 0, 1])))
    return dict(out, token_type_ids=types) if cfg.model_type == "bert" else out


def c(t):
    return t.detach().clone().contiguous()


def grown(model, seed):
    g = torch.Generator().manual_seed(seed)
    for n, p in sorted(model.named_parameters()):
        if p.requires_grad and ("lora_B" in n or "lora_embedding_A" in n):
            p.data = torch.randn(p.shape, generator=g) * 0.05


def run_of(model, inputs):
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    out.loss.backward()
    rec = {"logits": c(out.logits), "loss": c(out.loss).reshape(1)}
    for n, p in model.named_parameters():
        if p.requires_grad:
            rec["grad." + n] = c(p.grad) if p.grad is not None else torch.zeros_like(p)
    return rec


def train(model, inputs, steps=10):
    """Plain AdamW, gradient norm clipped to 1.0, the same batch each step."""
    ps = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)
    losses, norms = [], []
    for _ in range(steps):
        opt.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(ps, 1.0).detach().reshape(1))
        opt.step()
        losses.append(loss.detach().reshape(1))
    return {"train.loss": torch.cat(losses), "train.grad_norm": torch.cat(norms)}


def load(d):
    return tf.AutoModelForSequenceClassification.from_pretrained(d, dtype=torch.float32)


def make(name, cfg, variants, d, seed):
    torch.manual_seed(seed)
    base = tf.AutoModelForSequenceClassification.from_config(cfg).float().eval()
    for p in base.parameters():           # the default init is too small to tell errors from noise
        if p.dim() > 1:
            p.data.mul_(10.0)
        else:
            p.data.add_(torch.randn_like(p) * 0.1)
    base.save_pretrained(d)
    inputs = batch(name, cfg, seed + 1)
    with torch.no_grad():
        o = base(**inputs)
    save_file({**{k: c(v) for k, v in inputs.items()}, "logits": c(o.logits), "loss": c(o.loss).reshape(1)},
              os.path.join(d, "reference.safetensors"))
    for variant in variants:
        torch.manual_seed(seed + 2)
        m = get_peft_model(load(d), LoraConfig(task_type="SEQ_CLS", lora_dropout=0.0, **VARIANTS[variant])).eval()
        keep_init = variant == "pissa"
        if not keep_init:
            grown(m, seed + 3)
        a = os.path.join(d, "adapters", variant)
        m.save_pretrained(a)
        rec = run_of(m, inputs)
        rec.update(train(m, inputs))
        m.save_pretrained(os.path.join(a, "after_training"))
        if not keep_init:
            merged = PeftModel.from_pretrained(load(d), a).eval().merge_and_unload()
            was = base.state_dict()
            rec.update({"merged." + n: c(p) for n, p in merged.state_dict().items() if not torch.equal(was[n], p)})
        save_file(rec, os.path.join(a, "reference.safetensors"))
        print("classification", name, variant, float(rec["loss"]), "->", float(rec["train.loss"][-1]))


def tokenizer(cfg, out):
    text = [f"{s} was {a} and {b}, {' '.join(PLAIN)}." for s in SUBJECTS for a, b in zip(GOOD + BAD, BAD + GOOD)]
    if cfg.model_type == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        t = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        t.normalizer = normalizers.BertNormalizer(lowercase=True)
        t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        t.decoder = decoders.WordPiece()
        t.train_from_iterator(text, trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special))
        t.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        tok = tf.PreTrainedTokenizerFast(tokenizer_object=t, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
                                         sep_token="[SEP]", mask_token="[MASK]")
    else:
        roberta = cfg.model_type == "roberta"
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] if roberta else ["<pad>", "<s>", "</s>"]
        t = Tokenizer(models.BPE())
        t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        t.decoder = decoders.ByteLevel()
        t.train_from_iterator(text, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special,
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        if roberta:
            t.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        else:
            t.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
        tok = tf.PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tok.save_pretrained(out)
    pairs = [("The film was wonderful, really.", None), ("dull", None), ("", None),
             ("the actor seems Superb!", "but the plot is tedious and cold"), ("it is not it", "they are"),
             (" ".join(GOOD * 4), " ".join(BAD))]
    rows = []
    for one, other in pairs:
        for limit in (None, 12):
            cut = dict(truncation=True, max_length=limit) if limit else {}
            e = tok(one, other, return_token_type_ids=True, **cut)
            rows.append({"text": one, "text_pair": other, "max_length": limit, "input_ids": e["input_ids"],
                         "token_type_ids": e["token_type_ids"]})
    with open(os.path.join(out, "encoded.json"), "w") as f:
        json.dump(rows, f, indent=1)


def make_all(out, seed, hidden, only, tidy):
    for name, (cfg, variants) in checkpoints(hidden).items():
        if only and name not in only and "classification" not in only:
            continue
        d = os.path.join(out, "classification", name)
        shutil.rmtree(d, ignore_errors=True)
        make(name, cfg, variants, d, seed)
        tokenizer(cfg, d)
        tidy(d)
