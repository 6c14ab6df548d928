"""The golden adapter that PEFT begins by LoftQ: make_loftq.py FIXTURES, which holds `llama` of make_fixtures.py

Needs bitsandbytes 0.50.2 besides. PEFT packs on CUDA only: the name of the device is the one thing that is changed in its
text here. Written are FIXTURES/llama/adapters/loftq and its reference.safetensors, as make_fixtures.py writes the others."""
import inspect, os, sys
import torch
import transformers as tf
from peft import LoraConfig, LoftQConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from make_fixtures import merged_tensors, tensors_of_run, tidy, train

space = vars(loftq_utils)
exec(inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"'), space)
layer.loftq_init = space["loftq_init"]

folder = os.path.join(sys.argv[1], "llama")
out = os.path.join(folder, "adapters", "loftq")
given = load_file(os.path.join(folder, "reference.safetensors"))
inputs = {n: given[n] for n in ("input_ids", "attention_mask", "labels")}


def base():
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


torch.manual_seed(2)
config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"],
                    init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4, loftq_iter=2))
model = get_peft_model(base(), config).eval()
model.save_pretrained(out)
found = tensors_of_run(model, inputs)
found.update(train(model, inputs))
model.save_pretrained(os.path.join(out, "after_training"))
merged = PeftModel.from_pretrained(base(), out).eval().merge_and_unload()
found.update(merged_tensors(base().state_dict(), merged.state_dict()))
save_file(found, os.path.join(out, "reference.safetensors"))
tidy(folder)
print(float(found["loss"]), "->", float(found["train.loss"][-1]))
