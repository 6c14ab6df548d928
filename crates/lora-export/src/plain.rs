//! VeRA's and AdaLoRA's adapters as plain LoRA of the same change: everything on files works on such.

use crate::error::{Error, Result};
use lora_core::{AdaLora, Adapter, Lora, Vera, VeraProjection, padded};
use lora_format::{AdapterConfig, AdapterFolder, AdapterModule, LoraTensors, Method, VeraPair};
use std::collections::BTreeMap;
use tch::{Tensor, no_grad};

/// How wide the input of a module is, given the width of its output.
pub(crate) type InputWidth<'a> = &'a dyn Fn(&str, i64) -> Result<i64>;

/// The folder as it is where it is LoRA; else each module as a pair of scale 1, all of one rank, with zeros where AdaLoRA left
/// fewer triplets. Only VeRA asks for the width of an input, which its files do not say.
pub(crate) fn plain(folder: AdapterFolder, input_width: InputWidth<'_>) -> Result<AdapterFolder> {
    let AdapterFolder { config, modules } = folder;
    if config.method == Method::Lora {
        return Ok(AdapterFolder { config, modules });
    }
    let widths = widths_of(&modules, input_width)?;
    let projection = projection(&config, &modules, &widths)?;
    let mut pairs: BTreeMap<String, (Lora, Option<Tensor>)> = BTreeMap::new();
    let mut rest = BTreeMap::new();
    for (name, content) in modules {
        let fail = |e: lora_core::Error| Error::merge(&name, e);
        let (adapter, base_weight): (Adapter, _) = match (content, &config.method, &projection) {
            (AdapterModule::Vera(t), _, Some(shared)) => {
                let input = widths.get(&name).map_or(0, |(input, _)| *input);
                (Vera::from_parts(t.lambda_d, t.lambda_b, shared, input).map_err(fail)?.into(), t.base_weight)
            }
            (AdapterModule::AdaLora(t), Method::AdaLora(own), _) => {
                let scale = AdaLora::scale_of(config.lora_alpha, own.init_r, t.a.size()[0]);
                (AdaLora::from_parts(t.a, t.b, t.e, scale).map_err(fail)?.into(), t.base_weight)
            }
            (other, ..) => {
                rest.insert(name, other);
                continue;
            }
        };
        let lora = no_grad(|| -> lora_core::Result<Lora> {
            let lora = adapter.to_lora()?;
            Lora::from_parts(lora.a, lora.b.f_mul_scalar(lora.scale)?, 1.0)
        });
        pairs.insert(name.clone(), (lora.map_err(fail)?, base_weight));
    }
    let r = pairs.values().map(|(lora, _)| lora.r()).max().unwrap_or(1).max(1);
    for (name, (lora, base_weight)) in pairs {
        let (a, b) = padded(&lora.a, &lora.b, r).map_err(|e| Error::merge(&name, e))?;
        let tensors = LoraTensors { base_weight, ..LoraTensors::new(a, b) };
        rest.insert(name, AdapterModule::Linear(tensors));
    }
    let config = AdapterConfig { method: Method::Lora, r, lora_alpha: r as f64, use_rslora: false, ..config };
    let config = AdapterConfig { alpha_pattern: Vec::new(), rank_pattern: Vec::new(), ..config };
    Ok(AdapterFolder { config, modules: rest })
}

/// The width of the input of a linear layer from the shape of its weight, which is stored as `[out, in]` or, in GPT-2, the
/// other way round.
pub(crate) fn input_of(shape: &[i64], out: i64) -> Option<i64> {
    match *shape {
        [rows, columns] if rows == out => Some(columns),
        [rows, columns] if columns == out => Some(rows),
        _ => None,
    }
}

/// Input and output of each module under VeRA.
fn widths_of(
    modules: &BTreeMap<String, AdapterModule>,
    input_width: InputWidth<'_>,
) -> Result<BTreeMap<String, (i64, i64)>> {
    let mut widths = BTreeMap::new();
    for (name, content) in modules {
        let AdapterModule::Vera(t) = content else { continue };
        let out = t.lambda_b.size()[0];
        widths.insert(name.clone(), (input_width(name, out)?, out));
    }
    Ok(widths)
}

/// VeRA's pair: the file's own, or drawn from its key.
fn projection(
    config: &AdapterConfig,
    modules: &BTreeMap<String, AdapterModule>,
    widths: &BTreeMap<String, (i64, i64)>,
) -> Result<Option<VeraProjection>> {
    let Method::Vera(vera) = &config.method else { return Ok(None) };
    let saved = modules.values().find_map(|m| match m {
        AdapterModule::Vera(t) => t.projection.as_ref(),
        _ => None,
    });
    let widest = |width: fn(&(i64, i64)) -> i64| widths.values().map(width).max().unwrap_or(1);
    let pair = match saved {
        Some(VeraPair { a, b }) => VeraProjection::from_parts(a.shallow_clone(), b.shallow_clone()),
        None => VeraProjection::from_key(vera.projection_prng_key, config.r, widest(|w| w.0), widest(|w| w.1)),
    };
    pair.map(Some).map_err(|e| Error::merge("base_model.vera_A", e))
}
