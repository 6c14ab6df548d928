//! Adapters of all experts of a block together: PEFT's `target_parameters` on `gate_up_proj` and `down_proj`, which
//! transformers holds as one tensor each. Experts are separate layers here; each sees its slice of A and B, and the
//! trained leaf is the whole.

use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::inject::Parameter;
use crate::mlp::{Gated, Mlp};
use lora_core::{LinearLayer, Lora, LoraSpec, StackedLora};
use lora_format::{AdapterConfig, AdapterModule, LoraTensors, STACKED, stacked_key, turn_stacked};
use std::collections::{BTreeMap, BTreeSet};
use tch::{Device, Kind, Tensor};

/// Adapters of the stacked matrices of a block.
#[derive(Debug, Default)]
pub struct StackedAdapters {
    /// Of gates and ups, `[2 · intermediate, hidden]` for each expert: the rows of the gate come first.
    pub gate_up: Option<StackedLora>,
    /// Of downs, `[hidden, intermediate]` for each expert.
    pub down: Option<StackedLora>,
}

impl StackedAdapters {
    /// The place of a parameter, by its name.
    fn place(&mut self, parameter: &str) -> &mut Option<StackedLora> {
        if parameter == STACKED[0] { &mut self.gate_up } else { &mut self.down }
    }

    fn get(&self, parameter: &str) -> Option<&StackedLora> {
        if parameter == STACKED[0] { self.gate_up.as_ref() } else { self.down.as_ref() }
    }

    /// The slices of all experts.
    pub(crate) fn parts(&self) -> Result<StackedParts> {
        let of = |lora: &Option<StackedLora>| -> Result<Option<Slices>> {
            lora.as_ref().map(|l| Ok(Slices { scale: l.scale, pairs: l.parts()? })).transpose()
        };
        Ok(StackedParts { gate_up: of(&self.gate_up)?, down: of(&self.down)? })
    }
}

/// A and B of each expert.
struct Slices {
    scale: f64,
    pairs: Vec<(Tensor, Tensor)>,
}

impl Slices {
    /// The layer with its slice beside it: `rows` of B, or all.
    fn beside(&self, e: usize, layer: &LinearLayer, rows: Option<(i64, i64)>) -> Result<LinearLayer> {
        let Some((a, b)) = self.pairs.get(e) else { return bare(layer) };
        let b = match rows {
            Some((first, count)) => b.f_narrow(0, first, count)?,
            None => b.shallow_clone(),
        };
        let mut adapted = bare(layer)?;
        adapted.adapter = Some(Lora::from_parts(a.shallow_clone(), b, self.scale)?.into());
        Ok(adapted)
    }
}

fn bare(layer: &LinearLayer) -> Result<LinearLayer> {
    Ok(LinearLayer::frozen(layer.weight.shallow_clone(), layer.bias.as_ref().map(Tensor::shallow_clone))?)
}

/// The slices of one pass.
pub(crate) struct StackedParts {
    gate_up: Option<Slices>,
    down: Option<Slices>,
}

impl StackedParts {
    /// An expert with its slices; `None` where there are none.
    pub(crate) fn of(&self, e: usize, expert: &Gated) -> Result<Option<Gated>> {
        if self.gate_up.is_none() && self.down.is_none() {
            return Ok(None);
        }
        let (gate, up) = match &self.gate_up {
            Some(slices) => {
                let (first, second) = (expert.gate.out_features(), expert.up.out_features());
                (
                    slices.beside(e, &expert.gate, Some((0, first)))?,
                    slices.beside(e, &expert.up, Some((first, second)))?,
                )
            }
            None => (bare(&expert.gate)?, bare(&expert.up)?),
        };
        let down = match &self.down {
            Some(slices) => slices.beside(e, &expert.down, None)?,
            None => bare(&expert.down)?,
        };
        Ok(Some(Gated { gate, up, down }))
    }
}

/// A stacked parameter of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackSpec {
    /// `model.layers.0.mlp.experts.down_proj`, as transformers names it.
    pub path: String,
    /// The block that it is in.
    pub block: usize,
    /// `gate_up_proj` or `down_proj`.
    pub parameter: &'static str,
    /// How many experts there are.
    pub experts: i64,
    /// Width of an expert's input.
    pub in_features: i64,
    /// Width of an expert's output.
    pub out_features: i64,
}

impl StackSpec {
    /// A and B of an adapter in this parameter's layout: those of a file whose version did not tell that it has the other
    /// one are turned.
    ///
    /// # Errors
    /// [`Error::Module`] when they fit neither way.
    pub fn fit(&self, lora: &LoraTensors, r: i64) -> Result<(Tensor, Tensor)> {
        let (rows, input, output) = (lora.a.size()[0], lora.a.size()[1], lora.b.size()[0]);
        if rows == r * self.experts && (input, output) == (self.in_features, self.out_features) {
            return Ok((lora.a.shallow_clone(), lora.b.shallow_clone()));
        }
        if rows == r * self.experts && (output, input) == (self.in_features, self.out_features) {
            return Ok(turn_stacked(&lora.a, &lora.b, r)?);
        }
        let reason = format!(
            "goes from {input} to {output} with {} experts in the adapter, and from {} to {} with {} here",
            rows / r,
            self.in_features,
            self.out_features,
            self.experts
        );
        Err(Error::Module { module: self.path.clone(), reason })
    }
}

/// Every stacked parameter of a model, in the order of the forward pass.
pub fn stacks(c: &ModelConfig) -> Vec<StackSpec> {
    let (Some(names), Some(e)) = (c.layout.experts, &c.experts) else { return Vec::new() };
    let of = |block: usize| {
        let (h, inner) = (c.hidden_size, e.intermediate_size);
        STACKED.map(|parameter| {
            let (in_features, out_features) = if parameter == STACKED[0] { (h, 2 * inner) } else { (inner, h) };
            let path = c.in_block(block, &format!("{}.{parameter}", names.stacked));
            StackSpec { path, block, parameter, experts: e.count, in_features, out_features }
        })
    };
    (0..c.windows.len()).filter(|i| c.is_sparse(*i)).flat_map(of).collect()
}

/// A stacked adapter to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedStack {
    /// The parameter that gets it.
    pub stack: StackSpec,
    /// Its rank and scale, after the patterns.
    pub spec: LoraSpec,
}

/// What `target_parameters` means for a model.
///
/// # Errors
/// [`Error::Target`] for an entry that matches nothing, [`Error::Adapter`] for what cannot be applied.
pub(crate) fn plan_stacked(model: &ModelConfig, config: &AdapterConfig) -> Result<Vec<PlannedStack>> {
    let targets = config.target_parameters.as_deref().unwrap_or_default();
    let all = stacks(model);
    let meant = |path: &str, target: &str| path.strip_suffix(target).is_some_and(|p| p.is_empty() || p.ends_with('.'));
    for target in targets {
        if all.iter().any(|s| meant(&s.path, target)) {
            continue;
        }
        let field = "target_parameters";
        if target.ends_with(".weight") || target.ends_with(".bias") {
            let reason =
                "only the stacked matrices of experts are taken here; name modules in target_modules".to_string();
            return Err(Error::Adapter { field, value: target.clone(), reason });
        }
        if all.is_empty() {
            let reason = format!("{} has no stacked experts; name modules in target_modules", model.family);
            return Err(Error::Adapter { field, value: target.clone(), reason });
        }
        let nearest: BTreeSet<&str> = all.iter().map(|s| s.parameter).collect();
        let nearest = nearest.into_iter().map(|p| format!("experts.{p}")).collect();
        return Err(Error::Target { field, value: target.clone(), nearest });
    }
    let mut planned = Vec::new();
    for stack in all.into_iter().filter(|s| targets.iter().any(|t| meant(&s.path, t))) {
        let (r, alpha) = (config.rank_of(&stack.path)?, config.alpha_of(&stack.path)?);
        let most = stack.in_features.min(stack.out_features);
        if r > most {
            let reason =
                format!("`{}` is {most} wide on its smaller side, where a higher rank saves nothing", stack.path);
            return Err(Error::Adapter { field: "r", value: r.to_string(), reason });
        }
        planned.push(PlannedStack { spec: LoraSpec::new(r, alpha, config.use_rslora)?, stack });
    }
    Ok(planned)
}

impl Decoder {
    /// Every stacked adapter by the path of its parameter, in the order of the forward pass.
    pub fn stacked(&self) -> Vec<(String, &StackedLora)> {
        let of = |s: StackSpec| match &self.blocks.get(s.block)?.mlp {
            Mlp::Experts { stacked, .. } => Some((s.path, stacked.get(s.parameter)?)),
            _ => None,
        };
        stacks(&self.config).into_iter().filter_map(of).collect()
    }

    /// Puts an adapter beside a stacked parameter, or takes it off.
    pub(crate) fn set_stacked(&mut self, spec: &StackSpec, lora: Option<StackedLora>) -> Result<()> {
        let fault = |reason: &str| Error::Module { module: spec.path.clone(), reason: reason.into() };
        match self.blocks.get_mut(spec.block).map(|b| &mut b.mlp) {
            Some(Mlp::Experts { experts, stacked, .. }) => {
                let own = |g: &Gated| [&g.gate, &g.up, &g.down].into_iter().any(|l| l.adapter.is_some());
                if lora.is_some() && experts.iter().any(own) {
                    return Err(fault("has adapters of single experts, too; use one of the two forms"));
                }
                *stacked.place(spec.parameter) = lora;
                Ok(())
            }
            _ => Err(fault("is not in this model")),
        }
    }

    /// A stacked adapter of a folder, placed on this model's device; not yet in its place.
    pub(crate) fn placed_stack(
        &self,
        path: &str,
        lora: &LoraTensors,
        config: &AdapterConfig,
        place: impl Fn(&Tensor, Device) -> Result<Tensor>,
    ) -> Result<(StackSpec, StackedLora)> {
        let absent = || Error::Module { module: path.into(), reason: "is not in this model".into() };
        let stack = stacks(&self.config).into_iter().find(|s| s.path == path).ok_or_else(absent)?;
        let spec = LoraSpec::new(config.rank_of(path)?, config.alpha_of(path)?, config.use_rslora)?;
        let (a, b) = stack.fit(lora, spec.r())?;
        let device = self.device();
        let lora = StackedLora::from_parts(place(&a, device)?, place(&b, device)?, stack.experts, spec.scale())?;
        Ok((stack, lora))
    }

    /// The trained leaves of stacked adapters.
    pub(crate) fn stacked_parameters(&self) -> Vec<Parameter> {
        let list = self.stacked();
        let has = |path: &str| list.iter().any(|(p, _)| p == path);
        let mut parameters = Vec::new();
        for (path, lora) in &list {
            let key = stacked_key(path, has);
            for (part, t) in [("lora_A", &lora.a), ("lora_B", &lora.b)] {
                if t.requires_grad() {
                    parameters.push(Parameter { name: format!("{key}.{part}.weight"), tensor: t.shallow_clone() });
                }
            }
        }
        parameters
    }

    /// Stacked adapters as they are saved.
    pub(crate) fn stacked_modules(&self, list: &mut BTreeMap<String, AdapterModule>) {
        for (path, lora) in self.stacked() {
            let tensors = LoraTensors::new(lora.a.shallow_clone(), lora.b.shallow_clone());
            list.insert(path, AdapterModule::Stacked(tensors));
        }
    }

    /// The merged matrix of one expert of a stacked parameter, `[out, in]` in the dtype of the base: `W[e] + scale · B[e] A[e]`.
    /// Without an adapter it is the base's own.
    ///
    /// # Errors
    /// [`Error::Module`] for a parameter or an expert that is not in this model, or what libtorch reports.
    pub fn merged_expert(&self, path: &str, expert: usize) -> Result<Tensor> {
        let absent = || Error::Module { module: path.into(), reason: format!("has no expert {expert} in this model") };
        let spec = stacks(&self.config).into_iter().find(|s| s.path == path).ok_or_else(absent)?;
        let Some(Mlp::Experts { experts, stacked, .. }) = self.blocks.get(spec.block).map(|b| &b.mlp) else {
            return Err(absent());
        };
        let own = experts.get(expert).ok_or_else(absent)?;
        let weight = if spec.parameter == STACKED[0] {
            Tensor::f_cat(&[own.gate.weight.dense()?, own.up.weight.dense()?], 0)?
        } else {
            own.down.weight.dense()?
        };
        let Some(lora) = stacked.get(spec.parameter) else { return Ok(weight) };
        let wide = if weight.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let delta = lora.delta_of(expert as i64, wide)?;
        Ok(weight.f_detach()?.f_to_kind(wide)?.f_add(&delta)?.f_to_kind(weight.kind())?)
    }
}
