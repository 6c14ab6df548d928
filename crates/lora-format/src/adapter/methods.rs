//! The tensors of VeRA's and AdaLoRA's adapters: their names in PEFT's files, read and checked.

use super::{AdapterModule, BASE_WEIGHT, PREFIX, check_finite, read_float, saved_part, unexpected, wrong_shape};
use crate::adapter_config::{AdapterConfig, Method};
use crate::error::{Error, Result, TensorFault};
use crate::tensor_file::TensorFile;
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

/// The trained vectors of a layer under VeRA, and the pair around them.
#[derive(Debug)]
pub struct VeraTensors {
    /// `[out]`
    pub lambda_b: Tensor,
    /// `[r]`
    pub lambda_d: Tensor,
    /// The pair that all layers share; absent where the configuration leaves it to `projection_prng_key`.
    pub projection: Option<VeraPair>,
    /// The frozen weight `[out, in]`, which PEFT saves along when the head is a target.
    pub base_weight: Option<Tensor>,
}

/// VeRA's shared random pair.
#[derive(Debug)]
pub struct VeraPair {
    /// `[r, widest input]`
    pub a: Tensor,
    /// `[widest output, r]`
    pub b: Tensor,
}

impl VeraPair {
    /// Another handle to the same pair.
    pub fn share(&self) -> Self {
        Self { a: self.a.shallow_clone(), b: self.b.shallow_clone() }
    }
}

/// The triplets of a layer under AdaLoRA.
#[derive(Debug)]
pub struct AdaLoraTensors {
    /// `[r, in]`
    pub a: Tensor,
    /// `[out, r]`
    pub b: Tensor,
    /// `[r, 1]`
    pub e: Tensor,
    /// The frozen weight `[out, in]`, which PEFT saves along when the head is a target.
    pub base_weight: Option<Tensor>,
}

const LAMBDA_B: &str = ".vera_lambda_b";
const LAMBDA_D: &str = ".vera_lambda_d";
const SHARED_A: &str = "base_model.vera_A";
const SHARED_B: &str = "base_model.vera_B";
const TRIPLET_A: &str = ".lora_A";
const TRIPLET_B: &str = ".lora_B";
const TRIPLET_E: &str = ".lora_E";

/// What a file has for one module: tensors by suffix.
type Parts = BTreeMap<String, Tensor>;

/// Reads a file of one of these types; `None` for plain LoRA, whose names are others.
pub(super) fn read(file: &TensorFile, config: &AdapterConfig) -> Result<Option<BTreeMap<String, AdapterModule>>> {
    let suffixes: &[&str] = match &config.method {
        Method::Lora => return Ok(None),
        Method::Vera(_) => &[LAMBDA_B, LAMBDA_D, BASE_WEIGHT],
        Method::AdaLora(_) => &[TRIPLET_A, TRIPLET_B, TRIPLET_E, BASE_WEIGHT],
    };
    let path = file.path();
    let (mut adapted, mut saved): (BTreeMap<&str, Parts>, BTreeMap<&str, Parts>) = Default::default();
    let mut shared = [None, None];
    for name in file.names() {
        if let (Method::Vera(v), Some(i)) = (&config.method, [SHARED_A, SHARED_B].iter().position(|n| *n == name)) {
            if !v.save_projection {
                let why = "save_projection is false, so the pair is drawn from projection_prng_key; set it to true, or \
                           remove the tensor";
                return Err(unexpected(path, name, why));
            }
            shared[i] = Some(read_float(file, name)?);
            continue;
        }
        let inner = name
            .strip_prefix(PREFIX)
            .ok_or_else(|| unexpected(path, name, "the name does not begin with `base_model.model.`"))?;
        let own = suffixes.iter().find_map(|suffix| Some((inner.strip_suffix(suffix)?, *suffix)));
        let (list, module, part) = match own {
            Some((module, suffix)) => (&mut adapted, module, suffix),
            None => {
                let (module, part) = saved_part(inner, config).map_err(|why| unexpected(path, name, why))?;
                (&mut saved, module, part)
            }
        };
        list.entry(module).or_default().insert(part.to_string(), read_float(file, name)?);
    }
    let projection = projection(path, config, shared)?;
    let mut modules = BTreeMap::new();
    for (module, tensors) in saved {
        if adapted.contains_key(module) {
            return Err(unexpected(path, &format!("{PREFIX}{module}"), "the module has an adapter, too"));
        }
        modules.insert(module.to_string(), AdapterModule::Saved { tensors });
    }
    for (module, mut parts) in adapted {
        let targeted = match &config.target_modules {
            Some(targets) if !targets.is_all_linear() => targets.matches(module)?,
            _ => true,
        };
        let name = |suffix: &str| format!("{PREFIX}{module}{suffix}");
        if !targeted {
            return Err(unexpected(path, &name(suffixes[0]), "the module is not among target_modules"));
        }
        let base_weight = parts.remove(BASE_WEIGHT);
        let mut take =
            |suffix: &str| parts.remove(suffix).ok_or_else(|| Error::tensor(path, name(suffix), TensorFault::Missing));
        let content = if matches!(config.method, Method::Vera(_)) {
            AdapterModule::Vera(VeraTensors {
                lambda_b: take(LAMBDA_B)?,
                lambda_d: take(LAMBDA_D)?,
                projection: projection.as_ref().map(VeraPair::share),
                base_weight,
            })
        } else {
            let (a, b, e) = (take(TRIPLET_A)?, take(TRIPLET_B)?, take(TRIPLET_E)?);
            AdapterModule::AdaLora(AdaLoraTensors { a, b, e, base_weight })
        };
        modules.insert(module.to_string(), content);
    }
    Ok(Some(modules))
}

fn projection(path: &Path, config: &AdapterConfig, shared: [Option<Tensor>; 2]) -> Result<Option<VeraPair>> {
    let Method::Vera(v) = &config.method else { return Ok(None) };
    match shared {
        [Some(a), Some(b)] => {
            let pair = VeraPair { a, b };
            check_pair(path, config, &pair)?;
            Ok(Some(pair))
        }
        [None, None] if !v.save_projection => Ok(None),
        [a, _] => {
            let name = if a.is_none() { SHARED_A } else { SHARED_B };
            Err(Error::tensor(path, name, TensorFault::Missing))
        }
    }
}

fn check_pair(path: &Path, config: &AdapterConfig, pair: &VeraPair) -> Result<()> {
    let (a, b, r) = (pair.a.size(), pair.b.size(), config.r);
    if a.len() != 2 || a[0] != r || a[1] < 1 {
        return Err(wrong_shape(path, SHARED_A.into(), a, format!("[{r}, inputs] for the rank in the config")));
    }
    if b.len() != 2 || b[1] != r || b[0] < 1 {
        return Err(wrong_shape(path, SHARED_B.into(), b, format!("[outputs, {r}] for the rank in the config")));
    }
    check_finite(path, SHARED_A, &pair.a)?;
    check_finite(path, SHARED_B, &pair.b)
}

impl VeraTensors {
    pub(super) fn check(&self, path: &Path, config: &AdapterConfig, module: &str) -> Result<()> {
        let name = |suffix: &str| format!("{PREFIX}{module}{suffix}");
        let (d, b, r) = (self.lambda_d.size(), self.lambda_b.size(), config.r);
        if d != [r] {
            return Err(wrong_shape(path, name(LAMBDA_D), d, format!("[{r}] for the rank in the config")));
        }
        let most = self.projection.as_ref().map_or(i64::MAX, |p| p.b.size()[0]);
        if b.len() != 1 || !(1..=most).contains(&b[0]) {
            return Err(wrong_shape(path, name(LAMBDA_B), b, format!("[outputs], at most the {most} of vera_B")));
        }
        check_finite(path, &name(LAMBDA_D), &self.lambda_d)?;
        check_finite(path, &name(LAMBDA_B), &self.lambda_b)?;
        check_base(path, name(BASE_WEIGHT), self.base_weight.as_ref(), b[0], None)
    }

    /// Its tensors with their suffixes.
    pub(crate) fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let own = [(LAMBDA_B, &self.lambda_b), (LAMBDA_D, &self.lambda_d)];
        own.into_iter().chain(self.base_weight.as_ref().map(|w| (BASE_WEIGHT, w))).collect()
    }
}

impl AdaLoraTensors {
    pub(super) fn check(&self, path: &Path, config: &AdapterConfig, module: &str) -> Result<()> {
        let name = |suffix: &str| format!("{PREFIX}{module}{suffix}");
        let r = config.rank_of(module)?;
        let (a, b, e) = (self.a.size(), self.b.size(), self.e.size());
        let of_config = "for init_r and rank_pattern in the config";
        if a.len() != 2 || a[0] != r || a[1] < 1 {
            return Err(wrong_shape(path, name(TRIPLET_A), a, format!("[{r}, inputs] {of_config}")));
        }
        if b.len() != 2 || b[1] != r || b[0] < 1 {
            return Err(wrong_shape(path, name(TRIPLET_B), b, format!("[outputs, {r}] {of_config}")));
        }
        if e != [r, 1] {
            return Err(wrong_shape(path, name(TRIPLET_E), e, format!("[{r}, 1] {of_config}")));
        }
        for (suffix, tensor) in [(TRIPLET_A, &self.a), (TRIPLET_B, &self.b), (TRIPLET_E, &self.e)] {
            check_finite(path, &name(suffix), tensor)?;
        }
        check_base(path, name(BASE_WEIGHT), self.base_weight.as_ref(), b[0], Some(a[1]))
    }

    /// Its tensors with their suffixes.
    pub(crate) fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let own = [(TRIPLET_A, &self.a), (TRIPLET_B, &self.b), (TRIPLET_E, &self.e)];
        own.into_iter().chain(self.base_weight.as_ref().map(|w| (BASE_WEIGHT, w))).collect()
    }
}

fn check_base(path: &Path, name: String, base: Option<&Tensor>, out: i64, input: Option<i64>) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    let size = base.size();
    if size.len() != 2 || size[0] != out || input.is_some_and(|i| size[1] != i) {
        let input = input.map_or("inputs".to_string(), |i| i.to_string());
        return Err(wrong_shape(path, name, size, format!("[{out}, {input}], as the adapter says")));
    }
    check_finite(path, &name, base)
}

/// The shared pair to write, and its names.
///
/// # Errors
/// [`Error::Tensor`] when the configuration saves the pair and no module carries it.
pub(crate) fn pair_to_write<'a>(
    path: &Path,
    config: &AdapterConfig,
    modules: &'a BTreeMap<String, AdapterModule>,
) -> Result<Vec<(&'static str, &'a Tensor)>> {
    match &config.method {
        Method::Vera(v) if v.save_projection => {}
        _ => return Ok(Vec::new()),
    }
    let pair = modules.values().find_map(|m| match m {
        AdapterModule::Vera(vera) => vera.projection.as_ref(),
        _ => None,
    });
    let pair = pair.ok_or_else(|| Error::tensor(path, SHARED_A, TensorFault::Missing))?;
    check_pair(path, config, pair)?;
    Ok(vec![(SHARED_A, &pair.a), (SHARED_B, &pair.b)])
}
