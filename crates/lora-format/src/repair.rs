//! Names of adapter tensors that other tools are known to have written, put back into PEFT's form.
//!
//! Every rule is one history: a wrapper whose name got into the keys, a prefix that was left out or written twice, an adapter's
//! own name, the names of another family of tools. A name that no rule explains is left to the reader, which refuses it.

use crate::adapter::{
    BASE_BIAS, BASE_WEIGHT, LORA_A, LORA_B, LORA_B_BIAS, LORA_EMBEDDING_A, LORA_EMBEDDING_B, MAGNITUDE, PREFIX,
    TOKEN_ROWS, TOKEN_ROWS_ALONE,
};
use std::fmt;

/// What changed a name, and is taken back.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum KeyRule {
    /// The name of a wrapper in the path: `_orig_mod` of `torch.compile`, `module` of `DistributedDataParallel`, ...
    Wrapper(&'static str),
    /// The prefix of a module that held the whole PEFT model, such as Lightning's `model.`.
    Holder(&'static str),
    /// `base_model.model.` was left out.
    NoPrefix,
    /// `base_model.model.` stands there more than once.
    DoubledPrefix,
    /// The adapter's own name was left inside, as in `lora_A.default.weight`.
    AdapterName(String),
    /// A matrix whose name ends without `.weight`.
    BareMatrix,
    /// `lora_magnitude_vector.weight`, as PEFT 0.10 wrote it.
    OldMagnitude,
    /// `lora_down` and `lora_up`, as kohya's and the first diffusers scripts call A and B.
    DownUp,
    /// The path is that of another class of the same model; the folder of the model decided.
    Path {
        /// What the path began with.
        from: String,
        /// What it begins with in the model.
        to: String,
    },
}

impl KeyRule {
    /// Whether something was around the model when the name was made, which the reader would take for a part of the path.
    pub(crate) fn is_around(&self) -> bool {
        matches!(self, Self::Wrapper(_) | Self::Holder(_) | Self::DoubledPrefix)
    }
}

impl fmt::Display for KeyRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrapper(name) => write!(f, "`{name}.` of a wrapper taken out"),
            Self::Holder(name) => write!(f, "`{name}` before `{PREFIX}` taken off"),
            Self::NoPrefix => write!(f, "`{PREFIX}` put in front"),
            Self::DoubledPrefix => write!(f, "`{PREFIX}` once instead of several times"),
            Self::AdapterName(name) => write!(f, "the adapter's name `{name}` taken out"),
            Self::BareMatrix => write!(f, "`.weight` put behind a matrix"),
            Self::OldMagnitude => write!(f, "`.weight` taken off a magnitude"),
            Self::DownUp => write!(f, "lora_down and lora_up called lora_A and lora_B"),
            Self::Path { from, to } => write!(f, "`{from}` called `{to}`, as in the model"),
        }
    }
}

/// What a name stands for once it is put right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepairedKey {
    /// A tensor of the adapter.
    Tensor {
        /// The path of its module.
        module: String,
        /// What follows the path, such as `.lora_A.weight`.
        end: String,
    },
    /// kohya's `alpha` of a module: a number for the configuration.
    Alpha {
        /// The path of the module.
        module: String,
    },
}

/// The name of a tensor as PEFT writes it.
pub fn adapter_key(module: &str, end: &str) -> String {
    format!("{PREFIX}{module}{end}")
}

/// Wrappers that put their own name into the path of what they wrap, wherever that is.
const WRAPPERS: [&str; 3] = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"];
/// DistributedDataParallel and DeepSpeed wrap whole models, so theirs is a wrapper at the beginning only: models have layers
/// of this name, too.
const OUTER: &str = "module";
/// Modules that hold a whole PEFT model.
const HOLDERS: [&str; 2] = ["model.", "model.model."];
/// PEFT's ends of names, but for plain `weight` and `bias` of modules saved in full.
const ENDS: [&str; 10] = [
    LORA_A,
    LORA_B,
    LORA_EMBEDDING_A,
    LORA_EMBEDDING_B,
    LORA_B_BIAS,
    MAGNITUDE,
    BASE_WEIGHT,
    BASE_BIAS,
    TOKEN_ROWS,
    TOKEN_ROWS_ALONE,
];

/// The name as PEFT writes it, and the rules that led there; none for a name that is right already. `None` where no rule
/// explains the name.
pub fn repair_key(name: &str) -> Option<(RepairedKey, Vec<KeyRule>)> {
    let mut rules = Vec::new();
    let path = repair_path(name, &mut rules)?;
    if let Some(module) = path.strip_suffix(".alpha") {
        return Some((RepairedKey::Alpha { module: module.into() }, rules));
    }
    let path = repair_end(&path, &mut rules)?;
    let known = ENDS.iter().find_map(|end| Some((path.strip_suffix(end)?, *end)));
    let (module, end) = match known {
        Some(found) => found,
        None => path.rfind('.').map(|at| path.split_at(at))?,
    };
    Some((RepairedKey::Tensor { module: module.into(), end: end.into() }, rules))
}

/// The path in the model and the end, without what was put around and into it.
fn repair_path(name: &str, rules: &mut Vec<KeyRule>) -> Option<String> {
    let mut parts: Vec<&str> = name.split('.').collect();
    for wrapper in WRAPPERS {
        if parts.contains(&wrapper) {
            parts.retain(|part| *part != wrapper);
            rules.push(KeyRule::Wrapper(wrapper));
        }
    }
    let text = parts.join(".");
    let mut rest = text.as_str();
    let strip_outer = |rest: &mut &str, rules: &mut Vec<KeyRule>| {
        while let Some(inner) = rest.strip_prefix(OUTER).and_then(|inner| inner.strip_prefix('.')) {
            *rest = inner;
            if !rules.contains(&KeyRule::Wrapper(OUTER)) {
                rules.push(KeyRule::Wrapper(OUTER));
            }
        }
    };
    strip_outer(&mut rest, rules);
    for holder in HOLDERS {
        if let Some(inner) = rest.strip_prefix(holder)
            && inner.starts_with(PREFIX)
        {
            rest = inner;
            rules.push(KeyRule::Holder(holder));
        }
    }
    let mut times = 0;
    while let Some(inner) = rest.strip_prefix(PREFIX) {
        rest = inner;
        times += 1;
        strip_outer(&mut rest, rules);
    }
    match times {
        // A prefix in the middle, or half of one, is no history that is known.
        0 if rest.contains("base_model.") => return None,
        0 => rules.push(KeyRule::NoPrefix),
        1 => {}
        _ => rules.push(KeyRule::DoubledPrefix),
    }
    Some(rest.into())
}

/// The end of a name as PEFT has it.
fn repair_end(path: &str, rules: &mut Vec<KeyRule>) -> Option<String> {
    if ENDS.iter().any(|end| path.ends_with(end)) {
        return Some(path.into());
    }
    for (from, to) in [
        (".lora_down.weight", LORA_A),
        (".lora_up.weight", LORA_B),
        (".lora.down.weight", LORA_A),
        (".lora.up.weight", LORA_B),
    ] {
        if let Some(module) = path.strip_suffix(from) {
            rules.push(KeyRule::DownUp);
            return Some(format!("{module}{to}"));
        }
    }
    if let Some(module) = path.strip_suffix(".lora_magnitude_vector.weight") {
        rules.push(KeyRule::OldMagnitude);
        return Some(format!("{module}{MAGNITUDE}"));
    }
    if path.ends_with(".lora_A") || path.ends_with(".lora_B") {
        rules.push(KeyRule::BareMatrix);
        return Some(format!("{path}.weight"));
    }
    // An adapter's name has no dots.
    let adapter = |rest: &str| (!rest.is_empty() && !rest.contains('.')).then(|| rest.to_string());
    for (before, after, end) in [
        (".lora_A.", ".weight", LORA_A),
        (".lora_B.", ".weight", LORA_B),
        (".lora_B.", ".bias", LORA_B_BIAS),
        (".lora_embedding_A.", "", LORA_EMBEDDING_A),
        (".lora_embedding_B.", "", LORA_EMBEDDING_B),
        (".lora_magnitude_vector.", ".weight", MAGNITUDE),
        (".lora_magnitude_vector.", "", MAGNITUDE),
        (".token_adapter.trainable_tokens_delta.", "", TOKEN_ROWS),
        (".trainable_tokens_delta.", "", TOKEN_ROWS_ALONE),
    ] {
        if let Some((module, rest)) = path.split_once(before)
            && let Some(name) = rest.strip_suffix(after).and_then(adapter)
        {
            rules.push(KeyRule::AdapterName(name));
            return Some(format!("{module}{end}"));
        }
    }
    // What is left can only be a module saved in full, or one within it.
    let plain = path.ends_with(".weight") || path.ends_with(".bias");
    if let Some((module, rest)) = path.split_once(".modules_to_save.")
        && let Some((name, within)) = rest.split_once('.')
        && plain
    {
        rules.push(KeyRule::AdapterName(name.into()));
        return Some(format!("{module}.{within}"));
    }
    (plain && !path.contains(".lora") && !path.contains(".original_module.")).then(|| path.into())
}

/// What stands before the layers of one text model in the classes that hold it: alone, in a multimodal model of older and of
/// newer transformers, or without its head.
const HOMES: [&str; 6] =
    ["model.language_model.", "language_model.model.", "language_model.", "model.", "transformer.", ""];

/// The path by which `holds` knows a module that it does not know by `module`, and the rule that found it.
///
/// # Errors
/// The paths that it could be, where they are several or none.
pub fn rehome(module: &str, holds: impl Fn(&str) -> bool) -> Result<Option<(String, KeyRule)>, Vec<String>> {
    if holds(module) {
        return Ok(None);
    }
    let mut found: Vec<(String, KeyRule)> = Vec::new();
    for from in HOMES {
        let Some(core) = module.strip_prefix(from) else { continue };
        for to in HOMES.into_iter().filter(|to| *to != from) {
            let path = format!("{to}{core}");
            if holds(&path) && found.iter().all(|(other, _)| *other != path) {
                found.push((path, KeyRule::Path { from: from.into(), to: to.into() }));
            }
        }
    }
    match found.len() {
        1 => Ok(found.pop()),
        _ => Err(found.into_iter().map(|(path, _)| path).collect()),
    }
}

#[cfg(test)]
mod tests;
