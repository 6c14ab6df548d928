//! Adapters of linear layers that are not plain LoRA: VeRA and AdaLoRA, from a plan or from a file, and back to one.

use crate::decoder::{Decoder, ModuleRef};
use crate::error::{Error, Result};
use crate::target::{InjectionPlan, PlannedAdapter};
use lora_core::{AdaLora, Adapter, LinearLayer, Triplets, Vera, VeraProjection};
use lora_format::{AdaLoraTensors, AdapterConfig, AdapterFolder, AdapterModule, Method, VeraPair, VeraTensors};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// VeRA's pair for a plan, drawn from its key.
pub(crate) fn planned_projection(plan: &InjectionPlan, kind: Kind, device: Device) -> Result<Option<VeraProjection>> {
    let Method::Vera(vera) = &plan.config.method else { return Ok(None) };
    let widest = |width: fn(&PlannedAdapter) -> i64| plan.adapters.iter().map(width).max().unwrap_or(1);
    let (widest_in, widest_out) = (widest(|a| a.module.in_features), widest(|a| a.module.out_features));
    let drawn = VeraProjection::from_key(vera.projection_prng_key, plan.config.r, widest_in, widest_out)?;
    Ok(Some(drawn.used_in(kind, device)?))
}

/// A fresh adapter of another type than LoRA, its tensors not yet trained leaves; `None` for LoRA.
pub(crate) fn fresh(
    config: &AdapterConfig,
    planned: &PlannedAdapter,
    projection: Option<&VeraProjection>,
    seed: u64,
) -> Result<Option<Adapter>> {
    let m = &planned.module;
    Ok(match (&config.method, projection) {
        (Method::Vera(vera), Some(shared)) => {
            Some(Vera::fresh(shared, m.in_features, m.out_features, vera.d_initial)?.into())
        }
        (Method::AdaLora(a), _) => {
            Some(AdaLora::fresh(m.in_features, m.out_features, a.init_r, config.lora_alpha, seed)?.into())
        }
        _ => None,
    })
}

/// VeRA's pair for a file: its own, or drawn from the key for the widest of its modules.
///
/// # Errors
/// [`Error::Module`] for a module that the model lacks.
pub(crate) fn file_projection(folder: &AdapterFolder, model: &Decoder) -> Result<Option<VeraProjection>> {
    let Method::Vera(vera) = &folder.config.method else { return Ok(None) };
    let modules: BTreeMap<String, ModuleRef<'_>> = model.modules().into_iter().collect();
    let (mut widest_in, mut widest_out, mut saved) = (1, 1, None);
    for (path, content) in &folder.modules {
        let AdapterModule::Vera(tensors) = content else { continue };
        let Some(ModuleRef::Linear(layer)) = modules.get(path) else {
            let reason = "is not a linear layer of this model".into();
            return Err(Error::Module { module: path.clone(), reason });
        };
        (widest_in, widest_out) = (layer.in_features().max(widest_in), layer.out_features().max(widest_out));
        saved = saved.or(tensors.projection.as_ref());
    }
    let pair = match saved {
        Some(VeraPair { a, b }) => VeraProjection::from_parts(a.shallow_clone(), b.shallow_clone())?,
        None => VeraProjection::from_key(vera.projection_prng_key, folder.config.r, widest_in, widest_out)?,
    };
    Ok(Some(pair.used_in(model.kind(), model.device())?))
}

/// What a file has for a module if it is not LoRA: the adapter and the frozen weight that was saved along.
///
/// `place` brings a tensor to the model's device.
///
/// # Errors
/// [`Error::Module`] for shapes that do not fit the layer.
pub(crate) fn from_file<'a>(
    path: &str,
    content: &'a AdapterModule,
    config: &AdapterConfig,
    layer: &LinearLayer,
    projection: Option<&VeraProjection>,
    place: &dyn Fn(&Tensor) -> Result<Tensor>,
) -> Result<Option<(Adapter, Option<&'a Tensor>)>> {
    let fault = |reason: String| Error::Module { module: path.into(), reason };
    if !matches!(content, AdapterModule::Vera(_) | AdapterModule::AdaLora(_)) {
        return Ok(None);
    }
    let (adapter, base): (Adapter, _) = match (content, &config.method, projection) {
        (AdapterModule::Vera(VeraTensors { lambda_b, lambda_d, base_weight, .. }), _, Some(shared)) => {
            let vera = Vera::from_parts(place(lambda_d)?, place(lambda_b)?, shared, layer.in_features());
            (vera.map_err(|e| fault(e.to_string()))?.into(), base_weight)
        }
        (AdapterModule::AdaLora(AdaLoraTensors { a, b, e, base_weight }), Method::AdaLora(own), _) => {
            let scale = AdaLora::scale_of(config.lora_alpha, own.init_r, a.size()[0]);
            (AdaLora::from_parts(place(a)?, place(b)?, place(e)?, scale)?.into(), base_weight)
        }
        _ => return Err(fault(format!("has no {} adapter", config.method.peft_type()))),
    };
    let (wanted, got) = ((layer.in_features(), layer.out_features()), adapter.widths());
    if wanted != got {
        let ((wi, wo), (i, o)) = (wanted, got);
        return Err(fault(format!("goes from {i} to {o} in the adapter and from {wi} to {wo} here")));
    }
    Ok(Some((adapter, base.as_ref())))
}

/// An adapter as it is saved, with the frozen weight beside it where that is saved, too; `None` for LoRA.
pub(crate) fn to_file(adapter: &Adapter, base_weight: Option<Tensor>) -> Option<AdapterModule> {
    let copy = |t: &Tensor| t.shallow_clone();
    Some(match adapter {
        Adapter::Lora(_) => return None,
        Adapter::Vera(v) => AdapterModule::Vera(VeraTensors {
            lambda_b: copy(&v.lambda_b),
            lambda_d: copy(&v.lambda_d),
            projection: Some(VeraPair { a: copy(&v.projection.a), b: copy(&v.projection.b) }),
            base_weight,
        }),
        Adapter::AdaLora(l) => {
            AdapterModule::AdaLora(AdaLoraTensors { a: copy(&l.a), b: copy(&l.b), e: copy(&l.e), base_weight })
        }
    })
}

impl Decoder {
    /// Every layer with AdaLoRA's triplets, in the order of the forward pass.
    pub fn adalora(&self) -> Vec<(String, &AdaLora)> {
        let of = |(path, module)| match module {
            ModuleRef::Linear(LinearLayer { adapter: Some(Adapter::AdaLora(triplets)), .. }) => Some((path, triplets)),
            _ => None,
        };
        self.modules().into_iter().filter_map(of).collect()
    }

    /// The leaves of these layers, to be pruned.
    pub fn triplets(&self) -> Vec<Triplets> {
        let of = |(module, l): (String, &AdaLora)| Triplets {
            module,
            a: l.a.shallow_clone(),
            b: l.b.shallow_clone(),
            e: l.e.shallow_clone(),
        };
        self.adalora().into_iter().map(of).collect()
    }
}
