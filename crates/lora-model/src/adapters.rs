//! Several adapters over one base at run time: loaded by name, made active alone or weighted, given to each row of a batch
//! by itself, taken off, replaced from disk. The base is never read again.

use crate::decoder::{Decoder, ModuleMut};
use crate::error::{Error, Result};
use crate::inject::{Start, unpacked};
use crate::methods::{file_projection, from_file};
use crate::stacked::stacks;
use crate::tokens::TokenAdapters;
use lora_core::{Adapter, Lora, LoraSpec, StackedLora};
use lora_format::{AdapterFolder, AdapterModule};
use lora_torch::Segments;
use lora_torch::Weight;
use std::collections::{BTreeMap, BTreeSet};
use tch::{Kind, Tensor};

/// Adapters with what each counts for: `[("poet", 0.7), ("lawyer", 0.3)]`; empty is the base alone.
pub type AdapterMix<'a> = &'a [(&'a str, f64)];

/// The adapters that are loaded beside a model, and what they replaced in it.
#[derive(Debug, Default)]
pub struct AdapterSet {
    loaded: BTreeMap<String, Loaded>,
    /// Weights and biases of the base that the active adapter replaces, by module.
    replaced: BTreeMap<String, (Weight, Option<Tensor>)>,
}

/// One adapter.
#[derive(Debug)]
struct Loaded {
    low_rank: BTreeMap<String, Adapter>,
    /// Modules that it has in full, and biases of the base.
    whole: BTreeMap<String, BTreeMap<String, Tensor>>,
    /// Adapters of all experts of a block together.
    stacked: BTreeMap<String, StackedLora>,
    /// Rows of table and head.
    tokens: TokenAdapters,
}

impl AdapterSet {
    /// Loads an adapter under a name, checked against the model; one of the same name is replaced. It is not yet active.
    ///
    /// A PiSSA or OLoRA adapter that was not converted becomes a plain one over the unchanged base here. What lies under
    /// one that began by LoftQ is kept dense.
    ///
    /// # Errors
    /// [`Error::Module`] for a module that the model lacks or that has another shape.
    pub fn load(&mut self, name: &str, folder: &AdapterFolder, model: &mut Decoder) -> Result<()> {
        restore(&mut self.replaced, model);
        let (config, device) = (&folder.config, model.device());
        let start = Start::of(config).ok();
        let place = |t: &Tensor| -> Result<Tensor> { Ok(t.f_detach()?.f_to_device(device)?.f_to_kind(Kind::Float)?) };
        let projection = file_projection(folder, model)?;
        let tokens = model.tokens_of(folder, place)?;
        let mut stacked = BTreeMap::new();
        for (path, content) in &folder.modules {
            if let AdapterModule::Stacked(lora) = content {
                stacked.insert(path.clone(), model.placed_stack(path, lora, config, |t, _| place(t))?.1);
            }
        }
        let mut loaded = Loaded { low_rank: BTreeMap::new(), whole: BTreeMap::new(), stacked, tokens };
        let mut modules: BTreeMap<String, ModuleMut<'_>> = model.modules_mut().into_iter().collect();
        for (path, content) in &folder.modules {
            let fault = |reason: String| Error::Module { module: path.clone(), reason };
            if matches!(content, AdapterModule::Stacked(_) | AdapterModule::Tokens(_)) {
                continue;
            }
            let Some(module) = modules.get_mut(path) else { return Err(fault("is not in this model".into())) };
            if let ModuleMut::Linear(l) = module
                && let Some((other, base)) = from_file(path, content, config, l, projection.as_ref(), &place)?
            {
                // A frozen weight that PEFT saved along is the base's own.
                let own = if base.is_some() { Some(l.weight.dense()?) } else { None };
                if let Some(weight) = base.filter(|w| own.as_ref().is_none_or(|own| !same(w, own))) {
                    check_size(path, "weight", Some(weight), Some(l.weight.size()))?;
                    loaded.whole.insert(path.clone(), BTreeMap::from([("weight".to_string(), place(weight)?)]));
                }
                loaded.low_rank.insert(path.clone(), other);
                continue;
            }
            let lora = match content {
                AdapterModule::Saved { tensors } => {
                    let (weight, bias) = sizes(module);
                    check_size(path, "weight", tensors.get("weight"), Some(weight))?;
                    check_size(path, "bias", tensors.get("bias"), bias)?;
                    let placed = tensors.iter().map(|(n, t)| Ok((n.clone(), place(t)?)));
                    loaded.whole.insert(path.clone(), placed.collect::<Result<_>>()?);
                    continue;
                }
                AdapterModule::Linear(lora) | AdapterModule::Embedding(lora) => lora,
                _ => return Err(fault("is not a linear layer of this model".into())),
            };
            let spec = LoraSpec::new(config.rank_of(path)?, config.alpha_of(path)?, config.use_rslora)?;
            let (mut a, mut b) = (place(&lora.a)?, place(&lora.b)?);
            if let (Some(Start::OutOf(_)), ModuleMut::Linear(l)) = (start, &*module) {
                unpacked(path, l)?;
            }
            if let Some(Start::OutOf(principal)) = start {
                let mut began = principal.start(&dense(module)?, spec, 0)?;
                began.initial = Some((began.a.shallow_clone(), began.b.shallow_clone()));
                (began.a, began.b) = (a, b);
                (a, b) = began.converted()?;
            }
            let vector = |t: &Option<Tensor>| t.as_ref().map(place).transpose();
            let pair =
                Lora::from_parts(a, b, spec.scale())?.with_vectors(vector(&lora.bias)?, vector(&lora.magnitude)?);
            let pair = pair.map_err(|e| fault(e.to_string()))?;
            let (out, input) = (pair.b.size()[0], pair.a.size()[1]);
            let wanted = match (&*module, content) {
                (ModuleMut::Linear(l), AdapterModule::Linear(_)) => (l.out_features(), l.in_features()),
                (ModuleMut::Embedding(e), AdapterModule::Embedding(_)) => (e.weight.size()[1], e.weight.size()[0]),
                _ => return Err(fault("is of another kind in this model".into())),
            };
            if (out, input) != wanted {
                let (o, i) = wanted;
                return Err(fault(format!("goes from {input} to {out} in the adapter and from {i} to {o} here")));
            }
            check_size(path, "bias", lora.base_bias.as_ref(), sizes(module).1)?;
            // A frozen weight that PEFT saved along is the base's own.
            if let (Some(Start::Over(loftq)), ModuleMut::Linear(l)) = (start, &*module) {
                let packed = lora_torch::Weight::Nf4(loftq.base(&unpacked(path, l)?.dense()?, spec.r())?);
                loaded.whole.insert(path.clone(), BTreeMap::from([("weight".to_string(), place(&packed.dense()?)?)]));
            }
            let changed = match &lora.base_weight {
                Some(t) => !same(t, &dense(module)?),
                None => false,
            };
            let whole = [("weight", &lora.base_weight), ("bias", &lora.base_bias)];
            let whole: BTreeMap<String, Tensor> = whole
                .into_iter()
                .filter_map(|(n, t)| Some((n.to_string(), t.as_ref()?)))
                .filter(|(n, _)| n == "bias" || changed)
                .map(|(n, t)| Ok((n, place(t)?)))
                .collect::<Result<_>>()?;
            if !whole.is_empty() {
                loaded.whole.entry(path.clone()).or_default().extend(whole);
            }
            loaded.low_rank.insert(path.clone(), pair.into());
        }
        self.loaded.insert(name.into(), loaded);
        Ok(())
    }

    /// The names of the adapters that are loaded.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.loaded.keys().map(String::as_str)
    }

    /// Makes some adapters the active ones, each with its weight; none for the base alone. Takes as long as copying the
    /// adapters' matrices, and a pass then costs what one adapter of the sum of their ranks costs.
    ///
    /// # Errors
    /// [`Error::Adapter`] for a name that is not loaded, or adapters that cannot be weighted: those with DoRA, modules
    /// saved in full or biases of the base are active alone, with a weight of 1; those with rows of tokens have a weight of
    /// 1 and no row in common.
    pub fn activate(&mut self, model: &mut Decoder, mix: AdapterMix<'_>) -> Result<()> {
        let alone = matches!(mix, [(_, weight)] if *weight == 1.0);
        if alone {
            self.parts(mix)?;
        } else {
            self.check_weightable(mix)?;
        }
        let tokens: Vec<&TokenAdapters> =
            mix.iter().filter_map(|(name, _)| Some(&self.loaded.get(*name)?.tokens)).collect();
        let tokens = TokenAdapters::together(&tokens, model.config.vocab_size)?;
        restore(&mut self.replaced, model);
        let active: Vec<(&Loaded, f64)> = mix.iter().map(|(name, weight)| (&self.loaded[*name], *weight)).collect();
        for (path, module) in model.modules_mut() {
            let here: Vec<(&Adapter, f64)> =
                active.iter().filter_map(|(l, weight)| Some((l.low_rank.get(&path)?, *weight))).collect();
            set_adapter(module, if here.is_empty() { None } else { Some(combined(&here)?) });
        }
        for stack in stacks(&model.config) {
            let here: Vec<(&StackedLora, f64)> =
                active.iter().filter_map(|(l, weight)| Some((l.stacked.get(&stack.path)?, *weight))).collect();
            let lora = if here.is_empty() { None } else { Some(StackedLora::combined(&here)?) };
            model.set_stacked(&stack, lora)?;
        }
        model.tokens = tokens;
        // Only an adapter that is alone has modules in full.
        for (path, module) in model.modules_mut() {
            if let Some(tensors) = active.iter().find_map(|(l, _)| l.whole.get(&path)) {
                self.replaced.insert(path, replace(module, tensors));
            }
        }
        Ok(())
    }

    /// Gives each text of a batch its own adapters, in one pass over the base: row `i` of `mixes` is for segment `i`.
    /// Holds until [`AdapterSet::activate`] or the next call, for batches of these segments only, and for passes that need
    /// every row.
    ///
    /// # Errors
    /// As [`AdapterSet::activate`]; nothing but plain low-rank adapters can be given by row. [`Error::Input`] for another
    /// number of mixes than segments.
    pub fn route(&mut self, model: &mut Decoder, segments: &Segments, mixes: &[AdapterMix<'_>]) -> Result<()> {
        if mixes.len() != segments.lens().len() {
            let (expected, got) = (segments.lens().len().to_string(), mixes.len().to_string());
            return Err(Error::Input { what: "adapters by row", expected, got });
        }
        for mix in mixes {
            self.check_weightable(mix)?;
            let biased = |l: &Loaded| l.low_rank.values().filter_map(Adapter::as_lora).any(|lora| lora.bias.is_some());
            if let Some((name, ..)) = self.parts(mix)?.into_iter().find(|(_, l, _)| biased(l)) {
                let reason =
                    "it has biases of B (lora_bias), which cannot be given by row; use it for a whole batch".into();
                return Err(Error::Adapter { field: "adapter", value: name.into(), reason });
            }
            let whole = |l: &Loaded| !l.stacked.is_empty() || !l.tokens.is_empty();
            if let Some((name, ..)) = self.parts(mix)?.into_iter().find(|(_, l, _)| whole(l)) {
                let reason =
                    "it has stacked experts (target_parameters) or rows of tokens (trainable_token_indices), which \
                              cannot be given by row; use it for a whole batch"
                        .into();
                return Err(Error::Adapter { field: "adapter", value: name.into(), reason });
            }
        }
        restore(&mut self.replaced, model);
        model.tokens = TokenAdapters::default();
        for stack in stacks(&model.config) {
            model.set_stacked(&stack, None)?;
        }
        let names: BTreeSet<&str> = mixes.iter().flat_map(|mix| mix.iter().map(|(name, _)| *name)).collect();
        let names: Vec<&str> = names.into_iter().collect();
        // [tokens, adapters]: what each adapter counts for at each token.
        let by_token: Vec<f64> = mixes
            .iter()
            .zip(segments.lens())
            .flat_map(|(mix, &n)| {
                let weight = |name: &&str| mix.iter().filter(|(n, _)| n == name).map(|(_, w)| w).sum::<f64>();
                let row: Vec<f64> = names.iter().map(weight).collect();
                std::iter::repeat_n(row, n as usize).flatten()
            })
            .collect();
        let weights = Tensor::f_from_slice(&by_token)?.f_view([segments.total(), names.len() as i64])?;
        let weights = weights.f_to_kind(model.kind())?.f_to_device(model.device())?;
        for (path, module) in model.modules_mut() {
            let adapters = (0..).zip(&names).filter_map(|(i, name)| Some((i, self.loaded[*name].low_rank.get(&path)?)));
            let here: Vec<(i64, Lora)> = adapters.map(|(i, a)| Ok((i, a.to_lora()?))).collect::<Result<_>>()?;
            if here.is_empty() {
                set_adapter(module, None);
                continue;
            }
            let owners: Vec<i64> =
                here.iter().flat_map(|(i, lora)| std::iter::repeat_n(*i, lora.r() as usize)).collect();
            let owners = Tensor::f_from_slice(&owners)?.f_to_device(weights.device())?;
            let mut lora = weighted(&here.iter().map(|(_, lora)| (lora, 1.0)).collect::<Vec<_>>())?;
            lora.gate = Some(weights.f_index_select(1, &owners)?);
            set_adapter(module, Some(lora.into()));
        }
        Ok(())
    }

    /// Takes an adapter out of memory; if it is active, the base is left alone.
    ///
    /// # Errors
    /// [`Error::Adapter`] for a name that is not loaded.
    pub fn unload(&mut self, model: &mut Decoder, name: &str) -> Result<()> {
        self.activate(model, &[])?;
        self.loaded.remove(name).map(|_| ()).ok_or_else(|| self.unknown(name))
    }

    fn unknown(&self, name: &str) -> Error {
        let loaded: Vec<&str> = self.names().collect();
        let reason = format!("no adapter of this name is loaded; there are {}", loaded.join(", "));
        Error::Adapter { field: "adapter", value: name.into(), reason }
    }

    fn parts<'a>(&'a self, mix: AdapterMix<'a>) -> Result<Vec<(&'a str, &'a Loaded, f64)>> {
        let part = |(name, weight): &(&'a str, f64)| {
            let loaded = self.loaded.get(*name).ok_or_else(|| self.unknown(name))?;
            Ok((*name, loaded, *weight))
        };
        mix.iter().map(part).collect()
    }

    fn check_weightable(&self, mix: AdapterMix<'_>) -> Result<()> {
        for (name, loaded, weight) in self.parts(mix)? {
            let fault = |reason: &str| {
                let reason = format!("{reason}; use it alone with a weight of 1, or make one adapter by `lora mix`");
                Err(Error::Adapter { field: "adapter", value: format!("{name}={weight}"), reason })
            };
            if !weight.is_finite() {
                return fault("its weight is not a finite number");
            }
            if !loaded.whole.is_empty() {
                return fault("it has modules or biases in full, which cannot be weighted");
            }
            if !loaded.tokens.is_empty() && weight != 1.0 {
                return fault("it has rows of tokens, which cannot be weighted");
            }
            if loaded.low_rank.values().filter_map(Adapter::as_lora).any(|l| l.magnitude.is_some()) {
                return fault("DoRA cannot be weighted beside the base");
            }
        }
        Ok(())
    }
}

/// Puts back what the active adapter replaced.
fn restore(replaced: &mut BTreeMap<String, (Weight, Option<Tensor>)>, model: &mut Decoder) {
    for (path, module) in model.modules_mut() {
        let Some((weight, bias)) = replaced.remove(&path) else { continue };
        match module {
            ModuleMut::Linear(l) => (l.weight, l.bias) = (weight, bias),
            ModuleMut::Embedding(e) => put(&mut e.weight, weight),
            ModuleMut::Norm(n) => {
                put(&mut n.weight, weight);
                n.bias = bias;
            }
        }
    }
}

/// Tables and norms are never packed.
fn put(place: &mut Tensor, weight: Weight) {
    if let Weight::Plain(t) = weight {
        *place = t;
    }
}

/// Shapes of weight and bias.
fn sizes(module: &ModuleMut<'_>) -> (Vec<i64>, Option<Vec<i64>>) {
    match module {
        ModuleMut::Linear(l) => (l.weight.size(), l.bias.as_ref().map(Tensor::size)),
        ModuleMut::Embedding(e) => (e.weight.size(), None),
        ModuleMut::Norm(n) => (n.weight.size(), n.bias.as_ref().map(Tensor::size)),
    }
}

fn dense(module: &ModuleMut<'_>) -> Result<Tensor> {
    Ok(match module {
        ModuleMut::Linear(l) => l.weight.dense()?,
        ModuleMut::Embedding(e) => e.weight.shallow_clone(),
        ModuleMut::Norm(n) => n.weight.shallow_clone(),
    })
}

/// A tensor that replaces one of the base must find one of its size.
fn check_size(path: &str, name: &str, tensor: Option<&Tensor>, base: Option<Vec<i64>>) -> Result<()> {
    let Some(t) = tensor.filter(|t| base.as_ref().is_none_or(|b| *b != t.size())) else { return Ok(()) };
    let here = base.map_or_else(|| "absent".into(), |b| format!("{b:?}"));
    Err(Error::Module {
        module: path.into(),
        reason: format!("`{name}` is {:?} in the adapter and {here} here", t.size()),
    })
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    let equal = |b: Tensor| a.f_equal(&b).unwrap_or(false);
    a.size() == b.size() && b.f_to_device(a.device()).and_then(|b| b.f_to_kind(a.kind())).is_ok_and(equal)
}

/// Replaces weight and bias where they are given, and returns what was there.
fn replace(module: ModuleMut<'_>, tensors: &BTreeMap<String, Tensor>) -> (Weight, Option<Tensor>) {
    let new = |name: &str| tensors.get(name).map(Tensor::shallow_clone);
    let table = |place: &mut Tensor| {
        let old = place.shallow_clone();
        *place = new("weight").unwrap_or_else(|| place.shallow_clone());
        Weight::Plain(old)
    };
    let (weight, bias) = match module {
        ModuleMut::Linear(l) => {
            // A layer whose bias alone is replaced keeps its weight, and gets the same one back.
            let now = new("weight").map_or_else(|| l.weight.shallow_clone(), Weight::Plain);
            (std::mem::replace(&mut l.weight, now), Some(&mut l.bias))
        }
        ModuleMut::Embedding(e) => (table(&mut e.weight), None),
        ModuleMut::Norm(n) => (table(&mut n.weight), Some(&mut n.bias)),
    };
    let old = bias.as_deref().and_then(|b| b.as_ref().map(Tensor::shallow_clone));
    if let Some(Some(bias)) = bias {
        *bias = new("bias").unwrap_or_else(|| bias.shallow_clone());
    }
    (weight, old)
}

fn set_adapter(module: ModuleMut<'_>, adapter: Option<Adapter>) {
    match (module, adapter) {
        (ModuleMut::Linear(l), adapter) => l.adapter = adapter,
        (ModuleMut::Embedding(e), Some(Adapter::Lora(lora))) => e.lora = Some(lora),
        (ModuleMut::Embedding(e), _) => e.lora = None,
        (ModuleMut::Norm(_), _) => {}
    }
}

/// One adapter as it is, or the exact weighted sum of several as a plain pair, whatever their methods.
fn combined(parts: &[(&Adapter, f64)]) -> Result<Adapter> {
    if let [(one, 1.0)] = parts {
        return Ok(one.share());
    }
    let pairs: Vec<Lora> = parts.iter().map(|(adapter, _)| adapter.to_lora()).collect::<std::result::Result<_, _>>()?;
    Ok(weighted(&pairs.iter().zip(parts).map(|(lora, (_, weight))| (lora, *weight)).collect::<Vec<_>>())?.into())
}

/// `[A_1; A_2]`, `[w_1 s_1 B_1, w_2 s_2 B_2]`.
fn weighted(parts: &[(&Lora, f64)]) -> Result<Lora> {
    let a: Vec<&Tensor> = parts.iter().map(|(lora, _)| &lora.a).collect();
    let b = parts.iter().map(|(lora, weight)| lora.b.f_mul_scalar(lora.scale * weight));
    let b: Vec<Tensor> = b.collect::<std::result::Result<_, _>>()?;
    let mut bias: Option<Tensor> = None;
    for (lora, weight) in parts {
        let Some(own) = &lora.bias else { continue };
        let term = own.f_mul_scalar(lora.scale * weight)?;
        bias = Some(match bias {
            Some(sum) => sum.f_add(&term)?,
            None => term,
        });
    }
    Ok(Lora::from_parts(Tensor::f_cat(&a, 0)?, Tensor::f_cat(&b, 1)?, 1.0)?.with_vectors(bias, None)?)
}
