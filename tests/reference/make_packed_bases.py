"""Model folders that bitsandbytes packed: make_packed_bases.py FIXTURES, which holds `llama` of make_fixtures.py

Needs bitsandbytes 0.50.2 besides. FIXTURES/packed/FORM is a tiny Llama as transformers saves it when it was loaded in 4 bits (with
plain and with packed scales) or in 8; every width is a multiple of 64, as bitsandbytes' own code for the CPU unpacks others
wrongly. reference.safetensors has what it computes, alone and with the LoRA in `adapter`, and
some of its weights as bitsandbytes unpacks them (dense.NAME). bitsandbytes multiplies int8 weights with inputs that it rounds
to int8, too: for a reference in float32 they are unpacked before."""
import os, shutil, sys, tempfile
import torch
import bitsandbytes as bnb
import transformers as tf
from bitsandbytes import functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from make_fixtures import VOCAB, c, grown, tensors_of_run

tf.utils.logging.set_verbosity_error()
root = os.path.join(sys.argv[1], "packed")
given = load_file(os.path.join(sys.argv[1], "llama", "reference.safetensors"))
inputs = {n: given[n] for n in ("input_ids", "attention_mask", "labels")}
four = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
FORMS = {"nf4": four, "nf4_double": dict(four, bnb_4bit_use_double_quant=True), "int8": dict(load_in_8bit=True)}
SHOWN = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
LORA = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])


CONFIG = tf.LlamaConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
                        tie_word_embeddings=True)


def dense(layer):
    """The weight as bitsandbytes unpacks it."""
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def loaded(folder):
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear8bitLt):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(dense(layer).float(), requires_grad=False)
            model.set_submodule(name, plain)
            model.is_loaded_in_8bit = model.is_quantized = False
        elif isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # another form of the codes, of which narrow layers have none
    return model


torch.manual_seed(0)
source = tempfile.mkdtemp()
unpacked = tf.AutoModelForCausalLM.from_config(CONFIG).float()
for p in unpacked.parameters():           # the default init is too small to tell errors from noise
    p.data = p.data * 8.0 if p.dim() > 1 else p.data + torch.randn_like(p) * 0.1
unpacked.save_pretrained(source)

for form, settings in FORMS.items():
    folder = os.path.join(root, form)
    shutil.rmtree(folder, ignore_errors=True)
    packed = tf.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, device_map="cpu",
                                                     quantization_config=tf.BitsAndBytesConfig(**settings))
    packed.save_pretrained(folder)
    found = {"dense." + n + ".weight": c(dense(packed.get_submodule(n)).float()) for n in SHOWN}
    found.update({k: c(v) for k, v in inputs.items()})
    with torch.no_grad():
        out = loaded(folder)(**inputs, use_cache=False)
    found.update(logits=c(out.logits), loss=c(out.loss).reshape(1))
    save_file(found, os.path.join(folder, "reference.safetensors"))

    torch.manual_seed(2)
    model = get_peft_model(loaded(folder), LoraConfig(**LORA)).eval()
    grown(model, 3)
    adapter = os.path.join(folder, "adapter")
    model.save_pretrained(adapter)
    found = tensors_of_run(model, inputs)
    save_file(found, os.path.join(adapter, "reference.safetensors"))
    os.remove(os.path.join(adapter, "README.md"))
    os.remove(os.path.join(folder, "generation_config.json"))
    print(form, float(found["loss"]))
shutil.rmtree(source)
