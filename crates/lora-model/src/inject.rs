//! Putting adapters beside the weights, taking them out to be saved, and listing what is trained.

use crate::classify::Head;
use crate::decoder::{Decoder, ModuleMut, ModuleRef};
use crate::error::{Error, Result};
use crate::methods::{file_projection, fresh, from_file, planned_projection, to_file};
use crate::stacked::PlannedStack;
use crate::target::InjectionPlan;
use crate::weights::path_seed;
use lora_core::{
    Adapter, Init, LinearLayer, LoftQ, Lora, LoraSpec, Principal, StackedLora, init_embedding, init_linear, residual,
    row_norms,
};
use lora_format::{AdapterConfig, AdapterFolder, AdapterModule, InitLoraWeights, LoraTensors, TargetModules};
use lora_torch::{Weight, mix_seed};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};

/// A trained parameter: its name in an adapter file (without PEFT's prefix) or in the checkpoint, and the leaf itself.
#[derive(Debug)]
pub struct Parameter {
    /// `model.layers.0.self_attn.q_proj.lora_A.weight`
    pub name: String,
    /// The leaf; clones share it.
    pub tensor: Tensor,
}

impl Decoder {
    /// Puts fresh adapters where the plan says, and makes the modules that are saved in full trainable.
    ///
    /// # Errors
    /// [`Error::Adapter`] for an initialisation that is not known, or what libtorch reports.
    pub fn inject(&mut self, plan: &InjectionPlan, seed: u64) -> Result<()> {
        let (config, device) = (&plan.config, self.device());
        let (start, kind) = (Start::of(config)?, self.kind());
        self.lora_dropout = config.lora_dropout;
        let projection = planned_projection(plan, self.kind(), device)?;
        let adapters: BTreeMap<&str, _> = plan.adapters.iter().map(|a| (a.module.path.as_str(), a)).collect();
        for (path, module) in self.modules_mut() {
            let Some(planned) = adapters.get(path.as_str()) else { continue };
            let (m, own) = (&planned.module, mix_seed(&[seed, path_seed(&path)]));
            match module {
                ModuleMut::Linear(l) => {
                    if let Some(other) = fresh(config, planned, projection.as_ref(), own)? {
                        l.set_adapter(other.map_trained(|t| leaf(t, device))?)?;
                        continue;
                    }
                    let mut lora = match start {
                        Start::Beside(init) => {
                            init_linear(m.in_features, m.out_features, planned.spec, init, own, device)?
                        }
                        Start::OutOf(principal) => {
                            l.weight = whole(unpacked(&path, l)?, kind, device)?;
                            take_out(l, principal.start(&l.weight.dense()?, planned.spec, own)?)?
                        }
                        Start::Over(loftq) => {
                            let (packed, lora) = loftq.start(&unpacked(&path, l)?.dense()?, planned.spec)?;
                            l.weight = Weight::Nf4(packed).to_device(device)?;
                            Lora::from_parts(leaf(&lora.a, device)?, leaf(&lora.b, device)?, lora.scale)?
                        }
                    };
                    if config.lora_bias {
                        lora.bias = Some(leaf(&Tensor::f_zeros([m.out_features], (Kind::Float, device))?, device)?);
                    }
                    if config.use_dora {
                        lora.magnitude = Some(leaf(&row_norms(&l.weight, &lora)?, device)?);
                    }
                    l.set_adapter(lora)?;
                }
                ModuleMut::Embedding(e) => {
                    let mut lora = init_embedding(m.in_features, m.out_features, planned.spec, own, device)?;
                    if config.use_dora {
                        lora.magnitude = Some(leaf(&row_norms(&e.weight.f_tr()?.into(), &lora)?, device)?);
                    }
                    e.set_adapter(lora)?;
                }
                ModuleMut::Norm(_) => {}
            }
        }
        for module in &plan.saved {
            self.train_module(&module.path, None)?;
        }
        for PlannedStack { stack, spec } in &plan.stacked {
            // Other starts were refused with the configuration.
            let init = if let Start::Beside(init) = start { init } else { Init::Kaiming };
            let sizes = (stack.experts, stack.in_features, stack.out_features);
            let own = mix_seed(&[seed, path_seed(&stack.path)]);
            self.set_stacked(stack, Some(StackedLora::fresh(sizes, *spec, init, own, device)?))?;
        }
        if let Some(tokens) = &plan.tokens {
            self.inject_tokens(tokens)?;
        }
        self.train_biases(&config.bias)
    }

    /// Puts an existing adapter beside the weights that are here; its tensors become the trained leaves.
    ///
    /// An adapter of PEFT's that began as a part of the base (PiSSA, OLoRA) and was not converted takes that part out of
    /// the base again, and one that began by LoftQ packs the base again, as PEFT does when it loads one.
    ///
    /// # Errors
    /// [`Error::Module`] for a module that this model lacks or that has another shape.
    pub fn load_adapter(&mut self, folder: &AdapterFolder) -> Result<()> {
        let (device, kind, config) = (self.device(), self.kind(), &folder.config);
        let start = Start::of(config).unwrap_or(Start::Beside(Init::Kaiming));
        let projection = file_projection(folder, self)?;
        self.tokens = self.tokens_of(folder, |t| leaf(t, device))?;
        let (stage, model) = (self.stage.clone(), self.config.clone());
        for (path, content) in folder.modules.iter().filter(|(path, _)| stage.holds(&model, path)) {
            let fault = |reason: String| Error::Module { module: path.clone(), reason };
            let mut modules = self.modules_mut().into_iter();
            if let Some((_, ModuleMut::Linear(l))) = modules.find(|(p, _)| p == path)
                && let Some((other, base)) =
                    from_file(path, content, config, l, projection.as_ref(), &|t| leaf(t, device))?
            {
                l.set_adapter(other).map_err(|e| fault(e.to_string()))?;
                let base = base.map(Tensor::shallow_clone);
                if let Some(with) = &base {
                    self.replace_weight(path, with)?;
                }
                continue;
            }
            let lora = match content {
                AdapterModule::Saved { tensors } => {
                    self.train_module(path, Some(tensors))?;
                    continue;
                }
                AdapterModule::Tokens(_) => continue,
                AdapterModule::Stacked(lora) => {
                    let (stack, lora) = self.placed_stack(path, lora, config, leaf)?;
                    self.set_stacked(&stack, Some(lora))?;
                    continue;
                }
                AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) => lora,
                _ => return Err(fault("is not a linear layer of this model".into())),
            };
            if let Some(with) = &lora.base_weight {
                self.replace_weight(path, with)?;
            }
            let spec = LoraSpec::new(config.rank_of(path)?, config.alpha_of(path)?, config.use_rslora)?;
            let vector = |t: &Option<Tensor>| t.as_ref().map(|t| leaf(t, device)).transpose();
            let pair = Lora::from_parts(leaf(&lora.a, device)?, leaf(&lora.b, device)?, spec.scale())?
                .with_vectors(vector(&lora.bias)?, vector(&lora.magnitude)?)
                .map_err(|e| fault(e.to_string()))?;
            let found = self.modules_mut().into_iter().find(|(p, _)| p == path);
            match (found, content) {
                (None, _) => return Err(fault("is not in this model".into())),
                (Some((_, ModuleMut::Linear(l))), AdapterModule::Linear(_)) => {
                    let mut pair = pair;
                    if let Start::OutOf(principal) = start {
                        l.weight = whole(unpacked(path, l)?, kind, device)?;
                        let began = take_out(l, principal.start(&l.weight.dense()?, spec, path_seed(path))?)?;
                        pair.initial = began.initial;
                    }
                    if let Start::Over(loftq) = start {
                        l.weight =
                            Weight::Nf4(loftq.base(&unpacked(path, l)?.dense()?, spec.r())?).to_device(device)?;
                    }
                    if let Some(bias) = &lora.base_bias {
                        if l.bias.as_ref().is_none_or(|own| own.size() != bias.size()) {
                            return Err(fault(format!("has no bias of {:?} in this model", bias.size())));
                        }
                        l.bias = Some(leaf(bias, device)?);
                    }
                    l.set_adapter(pair).map_err(|e| fault(e.to_string()))?;
                }
                (Some((_, ModuleMut::Embedding(e))), AdapterModule::Embedding(_)) => {
                    e.set_adapter(pair).map_err(|e| fault(e.to_string()))?;
                }
                (Some(_), _) => return Err(fault("is of another kind in this model".into())),
            }
        }
        self.lora_dropout = config.lora_dropout;
        Ok(())
    }

    /// Puts another frozen weight in the place of a module's; where head and table are one weight, in that of both, as PEFT's
    /// loader does.
    fn replace_weight(&mut self, path: &str, with: &Tensor) -> Result<()> {
        let own = with.f_to_device(self.device())?.f_to_kind(self.kind())?;
        let layout = self.config.layout;
        let pair = [layout.embed_tokens, layout.lm_head];
        let both = self.config.tie_word_embeddings && pair.contains(&path);
        let fault = |got: Vec<i64>| Error::Module {
            module: path.into(),
            reason: format!("base_layer.weight is {:?} in the adapter and {got:?} here", with.size()),
        };
        for (found, module) in self.modules_mut() {
            if found != path && !(both && pair.contains(&found.as_str())) {
                continue;
            }
            match module {
                ModuleMut::Linear(l) if l.weight.size() == own.size() => l.weight = own.shallow_clone().into(),
                ModuleMut::Embedding(e) if e.weight.size() == own.size() => e.weight = own.shallow_clone(),
                ModuleMut::Linear(l) => return Err(fault(l.weight.size())),
                ModuleMut::Embedding(e) => return Err(fault(e.weight.size())),
                ModuleMut::Norm(_) => {}
            }
        }
        Ok(())
    }

    /// Makes biases of the base trainable: all of them, or those of layers with an adapter.
    fn train_biases(&mut self, which: &str) -> Result<()> {
        let device = self.device();
        for (_, module) in self.modules_mut() {
            let bias = match module {
                ModuleMut::Linear(l) if which == "all" || (which == "lora_only" && l.adapter.is_some()) => &mut l.bias,
                ModuleMut::Norm(n) if which == "all" => &mut n.bias,
                _ => continue,
            };
            if let Some(own) = bias {
                *own = leaf(own, device)?;
            }
        }
        Ok(())
    }

    /// Makes a module trainable in full, from `tensors` or from the base; an fp32 copy of its own, so that a tied or
    /// half-precision base stays as it is.
    fn train_module(&mut self, path: &str, tensors: Option<&BTreeMap<String, Tensor>>) -> Result<()> {
        let device = self.device();
        let fault = |reason: String| Error::Module { module: path.into(), reason };
        // A bias alone is what `bias = "all"` saves of a module without an adapter.
        let wanted = |name: &str| tensors.is_none_or(|t| t.contains_key(name));
        if let Some((name, _)) = tensors.and_then(|t| t.iter().find(|(n, _)| !["weight", "bias"].contains(&n.as_str())))
        {
            return Err(fault(format!("has no `{name}`")));
        }
        let own = |name: &str, base: &Tensor| -> Result<Tensor> {
            let t = tensors.and_then(|t| t.get(name)).unwrap_or(base);
            if t.size() != base.size() {
                return Err(fault(format!("`{name}` is {:?} in the adapter and {:?} here", t.size(), base.size())));
            }
            let kind = if base.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            Ok(t.f_detach()?.f_to_device(device)?.f_to_dtype(kind, false, true)?.f_set_requires_grad(true)?)
        };
        let bias = match self.modules_mut().into_iter().find(|(p, _)| p == path) {
            None => return Err(fault("is not in this model".into())),
            Some((_, ModuleMut::Linear(l))) => {
                if wanted("weight") {
                    l.weight = own("weight", &l.weight.dense()?)?.into();
                }
                Some(&mut l.bias)
            }
            Some((_, ModuleMut::Embedding(e))) => {
                if wanted("weight") {
                    e.weight = own("weight", &e.weight)?;
                }
                None
            }
            Some((_, ModuleMut::Norm(n))) => {
                if wanted("weight") {
                    n.weight = own("weight", &n.weight)?;
                }
                Some(&mut n.bias)
            }
        };
        match bias {
            Some(Some(bias)) if wanted("bias") => *bias = own("bias", bias)?,
            Some(Some(_)) => {}
            _ if tensors.is_some_and(|t| t.contains_key("bias")) => {
                return Err(fault("has no bias in this model".into()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Makes every weight trainable: full fine-tuning.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn train_everything(&mut self) -> Result<()> {
        for (_, module) in self.modules() {
            let set = |t: &Tensor| t.f_set_requires_grad(true).map(|_| ());
            let (weight, bias) = match module {
                ModuleRef::Linear(l) => (l.weight.plain(), l.bias.as_ref()),
                ModuleRef::Embedding(e) => (Some(&e.weight), None),
                ModuleRef::Norm(n) => (Some(&n.weight), n.bias.as_ref()),
            };
            weight.map_or(Ok(()), set)?;
            bias.map_or(Ok(()), set)?;
        }
        Ok(())
    }

    /// Every trained leaf once: those of modules in the order of the forward pass, then of stacked experts and tokens.
    pub fn parameters(&self) -> Vec<Parameter> {
        let table = self.embed_tokens.weight.data_ptr();
        let tied = match &self.head {
            Head::Language(head) => {
                self.config.tie_word_embeddings && head.weight.plain().is_some_and(|head| head.data_ptr() == table)
            }
            Head::Classes(_) | Head::Elsewhere => false,
        };
        let mut list = Vec::new();
        for (path, module) in self.modules() {
            let mut add = |suffix: &str, t: Option<&Tensor>| {
                if let Some(t) = t.filter(|t| t.requires_grad()) {
                    list.push(Parameter { name: format!("{path}.{suffix}"), tensor: t.shallow_clone() });
                }
            };
            let (weight, bias, adapter, lora) = match module {
                ModuleRef::Linear(l) => (l.weight.plain(), l.bias.as_ref(), l.adapter.as_ref(), None),
                ModuleRef::Embedding(e) => (Some(&e.weight), None, None, e.lora.as_ref()),
                ModuleRef::Norm(n) => (Some(&n.weight), n.bias.as_ref(), None, None),
            };
            add("weight", weight.filter(|_| !(tied && path == self.config.layout.lm_head)));
            add("bias", bias);
            for (name, tensor) in adapter.map(Adapter::tensors).unwrap_or_default() {
                add(name, Some(tensor));
            }
            if let Some(lora) = lora {
                add("lora_embedding_A", Some(&lora.a));
                add("lora_embedding_B", Some(&lora.b));
                add("lora_magnitude_vector", lora.magnitude.as_ref());
            }
        }
        list.extend(self.stacked_parameters());
        list.extend(self.token_parameters());
        list
    }

    /// The adapter as PEFT lays it out. Where `embed_tokens` or `lm_head` has one, the frozen weight goes with it, as PEFT
    /// saves it. One that began as a part of the base is converted to a plain one over the unchanged base.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn adapter_modules(&self) -> Result<BTreeMap<String, AdapterModule>> {
        let mut list = BTreeMap::new();
        for (path, module) in self.modules() {
            let (weight, bias, lora, embedding) = match module {
                ModuleRef::Linear(l) => {
                    let saved_along = l.weight.plain().filter(|_| saved_along(&path)).map(Tensor::shallow_clone);
                    if let Some(other) = l.adapter.as_ref().and_then(|a| to_file(a, saved_along)) {
                        list.insert(path, other);
                        continue;
                    }
                    (l.weight.plain(), l.bias.as_ref(), l.lora(), false)
                }
                ModuleRef::Embedding(e) => (Some(&e.weight), None, e.lora.as_ref(), true),
                ModuleRef::Norm(n) => (Some(&n.weight), n.bias.as_ref(), None, false),
            };
            let copy = |t: &Tensor| t.shallow_clone();
            let trained_bias = bias.filter(|b| b.requires_grad());
            let Some(lora) = lora else {
                let parts = [("weight", weight.filter(|w| w.requires_grad())), ("bias", trained_bias)];
                let tensors: BTreeMap<String, Tensor> =
                    parts.into_iter().filter_map(|(name, t)| Some((name.to_string(), copy(t?)))).collect();
                if !tensors.is_empty() {
                    list.insert(path, AdapterModule::Saved { tensors });
                }
                continue;
            };
            let (a, b) = lora.converted()?;
            let tensors = LoraTensors {
                a,
                b,
                bias: lora.bias.as_ref().map(copy),
                magnitude: lora.magnitude.as_ref().map(copy),
                base_weight: weight.filter(|_| saved_along(&path)).map(copy),
                base_bias: trained_bias.map(copy),
            };
            let content = if embedding { AdapterModule::Embedding(tensors) } else { AdapterModule::Linear(tensors) };
            list.insert(path, content);
        }
        self.stacked_modules(&mut list);
        self.token_modules(&mut list);
        Ok(list)
    }
}

/// Whether PEFT saves the frozen weight of a module with an adapter along.
fn saved_along(path: &str) -> bool {
    ["embed_tokens", "lm_head"].contains(&path.rsplit('.').next().unwrap_or(path))
}

/// A trained leaf, fp32 (fp64 where the value is).
fn leaf(t: &Tensor, device: Device) -> Result<Tensor> {
    Ok(t.f_detach()?.f_to_device(device)?.f_to_dtype(Kind::Float, false, true)?.f_set_requires_grad(true)?)
}

/// How adapters begin.
#[derive(Clone, Copy)]
pub(crate) enum Start {
    /// Beside a base that stays as it is.
    Beside(Init),
    /// As a part of the base, which is taken out of it.
    OutOf(Principal),
    /// As what the base loses when it is packed.
    Over(LoftQ),
}

impl Start {
    pub(crate) fn of(config: &AdapterConfig) -> Result<Self> {
        let name = match &config.init_lora_weights {
            InitLoraWeights::Default => return Ok(Self::Beside(Init::Kaiming)),
            InitLoraWeights::Random => return Ok(Self::Beside(Init::Random)),
            InitLoraWeights::Named(name) if name == "gaussian" => return Ok(Self::Beside(Init::Gaussian)),
            InitLoraWeights::Named(name) => name,
        };
        let refuse = |reason: &str| {
            Err(Error::Adapter { field: "init_lora_weights", value: name.clone(), reason: reason.into() })
        };
        let start = match (config.loftq_iterations(), Principal::named(name)) {
            (Some(iterations), _) => Self::Over(LoftQ { iterations }),
            (None, Some(principal)) => Self::OutOf(principal),
            (None, None) => {
                return refuse(
                    "supported are true, false, \"gaussian\", \"pissa\", \"pissa_niter_N\", \"olora\" and \"loftq\"",
                );
            }
        };
        if config.use_dora { refuse("it cannot be combined with use_dora; choose one of them") } else { Ok(start) }
    }
}

/// The weight in the dtype that is computed in, in memory of its own where it has to be converted: what changes the base
/// changes it there, and not in the coarser numbers of a file.
fn whole(weight: &Weight, kind: Kind, device: Device) -> Result<Weight> {
    Ok(weight.dense()?.f_to_device(device)?.f_to_kind(kind)?.into())
}

/// The weight of a layer whose adapter begins as a part of it, or as what packing loses of it.
pub(crate) fn unpacked<'a>(path: &str, layer: &'a LinearLayer) -> Result<&'a Weight> {
    match layer.weight.plain() {
        Some(_) => Ok(&layer.weight),
        None => Err(Error::Module {
            module: path.into(),
            reason:
                "is packed already, and this adapter changes the unpacked weight; load the unpacked checkpoint without quantization"
                    .into(),
        }),
    }
}

/// Takes what an adapter begins as out of the layer's weight, and makes it the trained leaves.
fn take_out(layer: &mut LinearLayer, start: Lora) -> Result<Lora> {
    layer.weight = residual(&layer.weight.dense()?, &start)?.into();
    let device = layer.weight.device();
    let trained = |t: &Tensor| -> Result<Tensor> {
        let mut own = Tensor::f_empty(t.size(), (t.kind(), device))?;
        own.f_copy_(t)?;
        Ok(own.f_set_requires_grad(true)?)
    };
    let mut lora = Lora::from_parts(trained(&start.a)?, trained(&start.b)?, start.scale)?;
    lora.initial = Some((start.a, start.b));
    Ok(lora)
}

/// The adapter configuration that names the default targets: every linear layer.
pub fn all_linear(r: i64, lora_alpha: f64) -> AdapterConfig {
    AdapterConfig {
        r,
        lora_alpha,
        task_type: Some("CAUSAL_LM".into()),
        target_modules: Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.into())),
        ..AdapterConfig::default()
    }
}
