//! Putting adapters beside the weights, taking them out to be saved, and listing what is trained.

use crate::decoder::{Decoder, ModuleMut, ModuleRef};
use crate::error::{Error, Result};
use crate::names::LM_HEAD;
use crate::target::InjectionPlan;
use crate::weights::path_seed;
use lora_core::{Init, Lora, init_embedding, init_linear};
use lora_format::{AdapterConfig, AdapterFolder, AdapterModule, InitLoraWeights, TargetModules};
use lora_torch::mix_seed;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};

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
        let init = match &plan.config.init_lora_weights {
            InitLoraWeights::Default => Init::Kaiming,
            InitLoraWeights::Random => Init::Random,
            InitLoraWeights::Named(name) if name == "gaussian" => Init::Gaussian,
            InitLoraWeights::Named(name) => {
                let reason = "supported are true, false and \"gaussian\"".to_string();
                return Err(Error::Adapter { field: "init_lora_weights", value: name.clone(), reason });
            }
        };
        let device = self.device();
        self.lora_dropout = plan.config.lora_dropout;
        let adapters: BTreeMap<&str, _> = plan.adapters.iter().map(|a| (a.module.path.as_str(), a)).collect();
        for (path, module) in self.modules_mut() {
            let Some(planned) = adapters.get(path.as_str()) else { continue };
            let (m, own) = (&planned.module, mix_seed(&[seed, path_seed(&path)]));
            match module {
                ModuleMut::Linear(l) => {
                    l.set_adapter(init_linear(m.in_features, m.out_features, planned.spec, init, own, device)?)?;
                }
                ModuleMut::Embedding(e) => {
                    e.set_adapter(init_embedding(m.in_features, m.out_features, planned.spec, own, device)?)?;
                }
                ModuleMut::Norm(_) => {}
            }
        }
        for module in &plan.saved {
            self.train_module(&module.path, None)?;
        }
        Ok(())
    }

    /// Puts an existing adapter beside the weights; its tensors become the trained leaves.
    ///
    /// # Errors
    /// [`Error::Module`] for a module that this model lacks or that has another shape.
    pub fn load_adapter(&mut self, folder: &AdapterFolder) -> Result<()> {
        let (device, dropout) = (self.device(), folder.config.lora_dropout);
        let leaf = |t: &Tensor| -> Result<Tensor> {
            Ok(t.f_detach()?.f_to_device(device)?.f_to_dtype(Kind::Float, false, true)?.f_set_requires_grad(true)?)
        };
        for (path, content) in &folder.modules {
            let fault = |reason: String| Error::Module { module: path.clone(), reason };
            if let AdapterModule::Saved { tensors } = content {
                self.train_module(path, Some(tensors))?;
                continue;
            }
            let spec = lora_core::LoraSpec::new(
                folder.config.rank_of(path)?,
                folder.config.alpha_of(path)?,
                folder.config.use_rslora,
            )?;
            let found = self.modules_mut().into_iter().find(|(p, _)| p == path);
            match (found, content) {
                (None, _) => return Err(fault("is not in this model".into())),
                (Some((_, ModuleMut::Linear(l))), AdapterModule::Linear { a, b, base_weight }) => {
                    replace(&l.weight, base_weight.as_ref()).map_err(&fault)?;
                    l.set_adapter(Lora::from_parts(leaf(a)?, leaf(b)?, spec.scale())?)
                        .map_err(|e| fault(e.to_string()))?;
                }
                (Some((_, ModuleMut::Embedding(e))), AdapterModule::Embedding { a, b, base_weight }) => {
                    replace(&e.weight, base_weight.as_ref()).map_err(&fault)?;
                    e.set_adapter(Lora::from_parts(leaf(a)?, leaf(b)?, spec.scale())?)
                        .map_err(|e| fault(e.to_string()))?;
                }
                (Some(_), _) => return Err(fault("is of another kind in this model".into())),
            }
        }
        self.lora_dropout = dropout;
        Ok(())
    }

    /// Makes a module trainable in full, from `tensors` or from the base; an fp32 copy of its own, so that a tied or
    /// half-precision base stays as it is.
    fn train_module(&mut self, path: &str, tensors: Option<&BTreeMap<String, Tensor>>) -> Result<()> {
        let device = self.device();
        let fault = |reason: String| Error::Module { module: path.into(), reason };
        let own = |name: &str, base: &Tensor| -> Result<Tensor> {
            let t = match tensors {
                None => base,
                Some(t) => t.get(name).ok_or_else(|| fault(format!("lacks `{name}` in the adapter")))?,
            };
            if t.size() != base.size() {
                return Err(fault(format!("`{name}` is {:?} in the adapter and {:?} here", t.size(), base.size())));
            }
            let kind = if base.kind() == Kind::Double { Kind::Double } else { Kind::Float };
            Ok(t.f_detach()?.f_to_device(device)?.f_to_dtype(kind, false, true)?.f_set_requires_grad(true)?)
        };
        match self.modules_mut().into_iter().find(|(p, _)| p == path) {
            None => return Err(fault("is not in this model".into())),
            Some((_, ModuleMut::Linear(l))) => {
                l.weight = own("weight", &l.weight)?;
                if let Some(bias) = &l.bias {
                    l.bias = Some(own("bias", bias)?);
                }
            }
            Some((_, ModuleMut::Embedding(e))) => e.weight = own("weight", &e.weight)?,
            Some((_, ModuleMut::Norm(w))) => *w = own("weight", w)?,
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
            match module {
                ModuleRef::Linear(l) => {
                    set(&l.weight)?;
                    l.bias.as_ref().map_or(Ok(()), set)?;
                }
                ModuleRef::Embedding(e) => set(&e.weight)?,
                ModuleRef::Norm(w) => set(w)?,
            }
        }
        Ok(())
    }

    /// Every trained leaf once, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<Parameter> {
        let tied =
            self.config.tie_word_embeddings && self.lm_head.weight.data_ptr() == self.embed_tokens.weight.data_ptr();
        let mut list = Vec::new();
        for (path, module) in self.modules() {
            let mut add = |suffix: &str, t: &Tensor| {
                if t.requires_grad() {
                    list.push(Parameter { name: format!("{path}.{suffix}"), tensor: t.shallow_clone() });
                }
            };
            match module {
                ModuleRef::Linear(l) => {
                    if !(tied && path == LM_HEAD) {
                        add("weight", &l.weight);
                    }
                    if let Some(bias) = &l.bias {
                        add("bias", bias);
                    }
                    if let Some(lora) = &l.lora {
                        add("lora_A.weight", &lora.a);
                        add("lora_B.weight", &lora.b);
                    }
                }
                ModuleRef::Embedding(e) => {
                    add("weight", &e.weight);
                    if let Some(lora) = &e.lora {
                        add("lora_embedding_A", &lora.a);
                        add("lora_embedding_B", &lora.b);
                    }
                }
                ModuleRef::Norm(w) => add("weight", w),
            }
        }
        list
    }

    /// The adapter as PEFT lays it out. Where the embedding or the head has one, the frozen weight goes with it, as PEFT
    /// saves it.
    pub fn adapter_modules(&self) -> BTreeMap<String, AdapterModule> {
        let mut list = BTreeMap::new();
        let saved = |parts: Vec<(&str, &Tensor)>| AdapterModule::Saved {
            tensors: parts.into_iter().map(|(n, t)| (n.to_string(), t.shallow_clone())).collect(),
        };
        for (path, module) in self.modules() {
            let content = match module {
                ModuleRef::Linear(l) => match &l.lora {
                    Some(lora) => {
                        let base_weight = (path == LM_HEAD).then(|| l.weight.shallow_clone());
                        Some(AdapterModule::Linear {
                            a: lora.a.shallow_clone(),
                            b: lora.b.shallow_clone(),
                            base_weight,
                        })
                    }
                    None if l.weight.requires_grad() => {
                        let bias = l.bias.as_ref().map(|b| ("bias", b));
                        Some(saved([("weight", &l.weight)].into_iter().chain(bias).collect()))
                    }
                    None => None,
                },
                ModuleRef::Embedding(e) => match &e.lora {
                    Some(lora) => Some(AdapterModule::Embedding {
                        a: lora.a.shallow_clone(),
                        b: lora.b.shallow_clone(),
                        base_weight: Some(e.weight.shallow_clone()),
                    }),
                    None => e.weight.requires_grad().then(|| saved(vec![("weight", &e.weight)])),
                },
                ModuleRef::Norm(w) => w.requires_grad().then(|| saved(vec![("weight", w)])),
            };
            if let Some(content) = content {
                list.insert(path, content);
            }
        }
        list
    }
}

/// Overwrites a frozen weight in place, so that whoever shares it sees the new one, as PEFT's loader does.
fn replace(weight: &Tensor, with: Option<&Tensor>) -> std::result::Result<(), String> {
    let Some(with) = with else { return Ok(()) };
    if with.size() != weight.size() {
        return Err(format!("base_layer.weight is {:?} in the adapter and {:?} here", with.size(), weight.size()));
    }
    tch::no_grad(|| weight.shallow_clone().f_copy_(with)).map(|_| ()).map_err(|e| e.to_string())
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
