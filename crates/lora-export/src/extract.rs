//! The difference of a fine-tuned checkpoint and its base as an adapter.

use crate::error::{Error, Result};
use crate::orient::Orientation;
use crate::plan::is_float;
use lora_core::cut_dense;
use lora_format::{
    AdapterConfig, AdapterModule, Checkpoint, LoraTensors, TargetModules, read_json_object, write_adapter,
};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Kind, Tensor};

/// Matrices that are no linear layers of a block: tables, heads, and routers of experts.
const NOT_LOW_RANK: [&str; 7] = ["embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out", "gate"];

/// What was extracted.
#[derive(Debug, Clone, PartialEq)]
pub struct ExtractReport {
    /// Linear layers that differ, each with an adapter now.
    pub modules: usize,
    /// Modules that differ and have no low-rank form: they are saved in full.
    pub saved: Vec<String>,
    /// `‖B A - D‖ / ‖D‖` (Frobenius) over all linear layers together, where D is the difference.
    pub error: f64,
    /// The largest such error of one layer, and which.
    pub worst: (f64, String),
}

/// Writes the first `rank` singular triplets of the difference of each linear layer as an adapter over `base`; modules that
/// differ otherwise (norms, biases, embeddings) are saved in full. `progress` hears the tensors compared so far and in all.
///
/// # Errors
/// [`Error::Extract`] for checkpoints of different tensors or shapes, or without a difference; as [`crate::merge()`] for files.
pub fn extract(
    base: &Path,
    tuned: &Path,
    rank: i64,
    out: &Path,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<ExtractReport> {
    let config = read_json_object(&base.join("config.json"))?;
    let (from, to) = (Checkpoint::open_unpacked(base)?, Checkpoint::open_unpacked(tuned)?);
    let orientation = Orientation::new(&from, &config);
    let names: Vec<&str> = from.names().filter(|name| to.contains(name)).collect();
    let refuse = |why: String| Error::Extract { tuned: tuned.into(), why };
    if let Some(missing) = from.names().find(|name| !to.contains(name) && !name.ends_with("inv_freq")) {
        return Err(refuse(format!("tensor `{missing}` of the base is not there; it is another model")));
    }
    let mut modules = BTreeMap::new();
    let mut saved: BTreeSet<String> = BTreeSet::new();
    let mut all_linear: BTreeSet<String> = BTreeSet::new();
    let (mut error, mut size, mut worst) = (0.0, 0.0, (0.0, String::new()));
    for (i, name) in names.iter().enumerate() {
        progress(i, names.len());
        let (a, b) = (from.info(name)?, to.info(name)?);
        if a.shape != b.shape {
            return Err(refuse(format!("tensor `{name}` is {:?}, and {:?} in the base", b.shape, a.shape)));
        }
        let Some((module, part)) = name.rsplit_once('.') else { continue };
        let last = module.rsplit('.').next().unwrap_or(module);
        let low_rank = part == "weight" && a.shape.len() == 2 && !NOT_LOW_RANK.contains(&last);
        if low_rank {
            all_linear.insert(module.to_string());
        }
        if !is_float(a.kind) || !is_float(b.kind) {
            continue;
        }
        let fail = |e: tch::TchError| Error::merge(name, e);
        let (was, is) = (from.read(name)?, to.read(name)?);
        let float = |t: &Tensor| t.f_to_kind(Kind::Float);
        let d = float(&is).and_then(|t| t.f_sub(&float(&was)?)).map_err(fail)?;
        let norm = d.f_norm().and_then(|n| n.f_double_value(&[])).map_err(fail)?;
        if norm == 0.0 {
            continue;
        }
        if !low_rank {
            saved.insert(module.to_string());
            continue;
        }
        let turned = orientation.stores_transposed(name);
        let d = if turned { d.f_tr().map_err(fail)? } else { d };
        let most = rank.min(a.shape[0]).min(a.shape[1]);
        let (down, up) = cut_dense(&d, most).map_err(|e| Error::merge(name, e))?;
        let (down, up) = lora_core::padded(&down, &up, rank).map_err(|e| Error::merge(name, e))?;
        let rest = up.f_matmul(&down).and_then(|p| p.f_sub(&d)).and_then(|r| r.f_norm());
        let rest = rest.and_then(|n| n.f_double_value(&[])).map_err(fail)?;
        (error, size) = (error + rest * rest, size + norm * norm);
        if rest / norm >= worst.0 {
            worst = (rest / norm, module.to_string());
        }
        modules.insert(module.to_string(), AdapterModule::Linear(LoraTensors::new(down, up)));
    }
    progress(names.len(), names.len());
    if modules.is_empty() {
        return Err(refuse("no linear layer differs from the base's; there is nothing to extract".into()));
    }
    let low_rank: BTreeSet<String> = modules.keys().cloned().collect();
    for module in &saved {
        let parts = ["weight", "bias"].into_iter().map(|part| (part, format!("{module}.{part}")));
        let tensors = parts.filter(|(_, name)| to.contains(name));
        let read = |(part, name): (&str, String)| -> Result<(String, Tensor)> {
            let tensor = to.read(&name)?.f_to_kind(Kind::Float).map_err(|e| Error::merge(&name, e))?;
            Ok((part.to_string(), tensor))
        };
        if low_rank.contains(module) {
            let why = format!("the bias of `{module}` differs as well as its weight, which one adapter cannot hold");
            return Err(refuse(why));
        }
        modules.insert(module.clone(), AdapterModule::Saved { tensors: tensors.map(read).collect::<Result<_>>()? });
    }
    let config = AdapterConfig {
        base_model_name_or_path: Some(base.to_string_lossy().into_owned()),
        task_type: Some("CAUSAL_LM".into()),
        r: rank,
        lora_alpha: rank as f64,
        target_modules: Some(TargetModules::List(names_for(&low_rank, &all_linear))),
        modules_to_save: (!saved.is_empty()).then(|| saved.iter().cloned().collect()),
        ..AdapterConfig::default()
    };
    write_adapter(out, &config, &modules)?;
    let saved: Vec<String> = saved.into_iter().collect();
    Ok(ExtractReport { modules: low_rank.len(), saved, error: (error / size).sqrt(), worst })
}

/// Last parts of paths where they mean these modules and no others, and whole paths elsewhere.
fn names_for(wanted: &BTreeSet<String>, all: &BTreeSet<String>) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let clear = |name: &str| all.iter().filter(|path| last(path) == name).all(|path| wanted.contains(path));
    let names: BTreeSet<String> =
        wanted.iter().map(|path| if clear(&last(path)) { last(path) } else { path.clone() }).collect();
    names.into_iter().collect()
}
