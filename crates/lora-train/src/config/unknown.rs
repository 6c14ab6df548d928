//! Keys that do not exist here: what is said of those of PEFT, Hugging Face and LLaMA-Factory, and the nearest key for a
//! slip of the pen.

use super::faults::FaultKind;
use super::keys::Key;
use super::{SECTIONS, TOP_KEYS};
use crate::suggest::nearest;
use toml::Value;

/// A key of `LoraConfig` or `TrainingArguments` that is not one here.
struct Foreign {
    name: &'static str,
    /// Values, beside false and empty ones, that ask for nothing.
    harmless: &'static [&'static str],
    why: &'static str,
}

const fn foreign(name: &'static str, harmless: &'static [&'static str], why: &'static str) -> Foreign {
    Foreign { name, harmless, why }
}

const NOT_YET: &str = "is not supported yet; remove it";
const FIXED: &str = "is not a choice here; remove it";

const FOREIGN: &[Foreign] = &[
    foreign(
        "layer_replication",
        &[],
        "repeats layers of the base, which is not supported; save the expanded model and train it",
    ),
    foreign("use_qalora", &[], NOT_YET),
    foreign("use_bdlora", &[], NOT_YET),
    foreign("alora_invocation_tokens", &[], NOT_YET),
    foreign("loftq_config", &[], NOT_YET),
    foreign("eva_config", &[], NOT_YET),
    foreign("corda_config", &[], NOT_YET),
    foreign("lora_ga_config", &[], NOT_YET),
    foreign("fan_in_fan_out", &["true"], "is found from the model; remove it"),
    foreign("auto_mapping", &[], "names code to load, which does not exist here; remove it"),
    foreign("trust_remote_code", &[], "code of a checkpoint is never run; remove it"),
    foreign("quantization", &["\"none\""], NOT_YET),
    foreign("load_in_4bit", &[], NOT_YET),
    foreign("load_in_8bit", &[], NOT_YET),
    foreign("quantization_bit", &[], NOT_YET),
    foreign("attn_implementation", &["\"sdpa\""], "is chosen for the device; remove it"),
    foreign("flash_attn", &["\"auto\"", "\"sdpa\""], "is chosen for the device; remove it"),
    foreign("fp16", &[], "is not needed: set model.dtype = \"float16\""),
    foreign("bf16", &[], "is not needed: set model.dtype = \"bfloat16\""),
    foreign("tf32", &[], NOT_YET),
    foreign("label_smoothing_factor", &["0", "0.0"], NOT_YET),
    foreign("group_by_length", &[], "is not needed: no padding is computed"),
    foreign("padding_free", &["true"], "is always on"),
    foreign("neat_packing", &["true"], "is how data.packing always works; remove it"),
    foreign("torch_compile", &[], FIXED),
    foreign("use_liger_kernel", &["true"], "is not needed: fused operations are built in"),
    foreign("deepspeed", &[], NOT_YET),
    foreign("fsdp", &[], NOT_YET),
    foreign("push_to_hub", &[], NOT_YET),
    foreign("report_to", &["\"none\"", "\"tensorboard\""], "metrics go to metrics.jsonl in output_dir; remove it"),
    foreign("eval_strategy", &["\"no\"", "\"steps\""], "set train.eval_steps, in optimizer steps"),
    foreign("save_strategy", &["\"steps\""], "set train.save_steps, in optimizer steps"),
    foreign("logging_strategy", &["\"steps\""], "set train.logging_steps, in optimizer steps"),
    foreign("resume_from_checkpoint", &[], "start the run with --resume"),
    foreign("overwrite_output_dir", &[], "a run's folder is never overwritten; choose another output_dir"),
    foreign("weight", &["1", "1.0"], NOT_YET),
];

/// Other names of our keys.
const ALIASES: &[(&str, &str)] = &[
    ("model_name_or_path", "model.path"),
    ("base_model_name_or_path", "model.path"),
    ("torch_dtype", "model.dtype"),
    ("rank", "lora.r"),
    ("lora_r", "lora.r"),
    ("lora_rank", "lora.r"),
    ("alpha", "lora.lora_alpha"),
    ("dropout", "lora.lora_dropout"),
    ("lora_target", "lora.target_modules"),
    ("adapter_name_or_path", "lora.init_adapter"),
    ("dataset", "data.train"),
    ("train_file", "data.train"),
    ("eval_dataset", "data.eval"),
    ("val_size", "data.eval_split"),
    ("cutoff_len", "data.max_length"),
    ("max_seq_length", "data.max_length"),
    ("chat_template", "data.template"),
    ("epochs", "train.num_train_epochs"),
    ("steps", "train.max_steps"),
    ("lr", "train.learning_rate"),
    ("batch_size", "train.per_device_train_batch_size"),
    ("scheduler", "train.lr_scheduler_type"),
    ("method", "train.finetuning_type"),
];

/// The fault of an unknown key; `None` when it asks for nothing, so that it can be left out.
pub(crate) fn unknown(prefix: &str, keys: &'static [Key], name: &str, value: &Value) -> Option<FaultKind> {
    if let Some(foreign) = FOREIGN.iter().find(|foreign| foreign.name == name) {
        return (!is_harmless(foreign, value)).then_some(FaultKind::Unsupported { why: foreign.why });
    }
    let nearest = elsewhere(name).or_else(|| nearby(prefix, keys, name));
    Some(FaultKind::UnknownKey { nearest })
}

fn is_harmless(foreign: &Foreign, value: &Value) -> bool {
    match value {
        Value::Boolean(false) => true,
        Value::String(s) if s.is_empty() => true,
        Value::Array(list) if list.is_empty() => true,
        Value::Table(table) if table.is_empty() => true,
        other => foreign.harmless.contains(&other.to_string().as_str()),
    }
}

/// A key that has this name in another section, or under another name.
fn elsewhere(name: &str) -> Option<String> {
    let alias = ALIASES.iter().find(|(alias, _)| *alias == name).map(|(_, key)| key.to_string());
    alias.or_else(|| all_keys().find(|(_, key)| *key == name).map(|(section, key)| dotted(section, key)))
}

/// The nearest name: in the same table first, then anywhere.
fn nearby(prefix: &str, keys: &'static [Key], name: &str) -> Option<String> {
    if let Some(near) = nearest(name, keys.iter().map(|key| key.name)) {
        return Some(format!("{prefix}{near}"));
    }
    if prefix.is_empty()
        && let Some(section) = nearest(name, SECTIONS.iter().map(|(section, _)| *section))
    {
        return Some(format!("[{section}]"));
    }
    let near = nearest(name, all_keys().map(|(_, key)| key))?;
    all_keys().find(|(_, key)| *key == near).map(|(section, key)| dotted(section, key))
}

fn all_keys() -> impl Iterator<Item = (&'static str, &'static str)> {
    let top = TOP_KEYS.iter().map(|key| ("", key.name));
    top.chain(SECTIONS.iter().flat_map(|(section, keys)| keys.iter().map(|key| (*section, key.name))))
}

fn dotted(section: &str, key: &str) -> String {
    if section.is_empty() { key.to_string() } else { format!("{section}.{key}") }
}
