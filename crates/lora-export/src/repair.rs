//! Adapters whose tensors other tools named otherwise, written anew under PEFT's names.

use crate::error::{Error, Result};
use crate::merge::{check_output, make_parent};
use crate::plan::Plan;
use crate::tied::tied_pair;
use lora_format::{
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterConfig, Checkpoint, KeyRule, RepairedKey, STACKED, TargetModules,
    TensorFile, TensorWriter, adapter_key, create_staging_dir, read_adapter, read_json_object, rehome, repair_key,
    sync_dir, write_atomic,
};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A tensor under another name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renamed {
    /// Its name in the file.
    pub from: String,
    /// PEFT's name for it.
    pub to: String,
    /// Why, in the order in which the rules were applied.
    pub rules: Vec<KeyRule>,
}

/// What a repair does.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Repair {
    /// The tensors that get another name.
    pub renamed: Vec<Renamed>,
    /// Tensors named `alpha` that say what the configuration says already, and are left out.
    pub alphas: Vec<String>,
    /// The modules that `target_modules` names anew, where it did not name those that have an adapter.
    pub targets: Option<Vec<String>>,
    /// All tensors of the result.
    pub tensors: usize,
}

impl Repair {
    /// Whether there is anything to do.
    pub fn is_needed(&self) -> bool {
        !self.renamed.is_empty() || !self.alphas.is_empty() || self.targets.is_some()
    }
}

/// Gives the tensors of an adapter the names that PEFT would have written, and writes it to the new folder `out`, if there
/// is something to repair and `out` is given. Values stay as they are, byte for byte.
///
/// `model`, the folder of the base model, decides where paths are at home that differ between the classes of one model; the
/// result is checked against it. The result is read as any adapter is before it appears.
///
/// # Errors
/// [`Error::Repair`] for a name that no known history explains, one that could be several, two tensors of one name, and an
/// `alpha` that the configuration contradicts; [`Error::Format`] for files; as [`merge`](crate::merge()) for an adapter that
/// does not fit the model.
pub fn repair_adapter(adapter: &Path, model: Option<&Path>, out: Option<&Path>) -> Result<Repair> {
    if let Some(out) = out {
        check_output(out)?;
    }
    let config_path = adapter.join(ADAPTER_CONFIG);
    let config = AdapterConfig::read(&config_path)?;
    config.check_supported(&config_path)?;
    let weights = adapter.join(ADAPTER_WEIGHTS);
    let pickle = adapter.join("adapter_model.bin");
    if !weights.exists() && pickle.exists() {
        return Err(lora_format::Error::Pickle { path: pickle }.into());
    }
    let file = TensorFile::open(&weights)?;
    let model = model.map(Model::open).transpose()?;
    let names = Names::plan(adapter, &file, &config, model.as_ref())?;
    names.check_alphas(adapter, &file, &config)?;
    let targets = names.targets(&config, model.as_ref())?;
    let renamed = |(to, (from, rules)): (&String, &(String, Vec<KeyRule>))| {
        let renamed = Renamed { from: from.clone(), to: to.clone(), rules: rules.clone() };
        (renamed.from != renamed.to).then_some(renamed)
    };
    let repair = Repair {
        renamed: names.tensors.iter().filter_map(renamed).collect(),
        alphas: names.alphas.iter().map(|(name, _)| name.clone()).collect(),
        targets,
        tensors: names.tensors.len(),
    };
    if let Some(out) = out.filter(|_| repair.is_needed()) {
        write(adapter, &file, &names, &repair, model.as_ref(), out)?;
    }
    Ok(repair)
}

/// The base model, as far as names go.
struct Model {
    base: Checkpoint,
    config: serde_json::Map<String, Value>,
    modules: BTreeSet<String>,
}

impl Model {
    fn open(dir: &Path) -> Result<Self> {
        let config = read_json_object(&dir.join("config.json"))?;
        let base = Checkpoint::open_unpacked(dir)?;
        let tied = tied_pair(&base, &config).map(|pair| pair.head);
        let modules = base.names().chain(tied).filter_map(|n| n.strip_suffix(".weight")).map(String::from).collect();
        Ok(Model { base, config, modules })
    }
}

/// What every tensor of a file is.
struct Names {
    /// PEFT's name, the name in the file, and the rules that lead from the one to the other.
    tensors: BTreeMap<String, (String, Vec<KeyRule>)>,
    /// The modules that have an update.
    updated: BTreeSet<String>,
    /// Names of alphas, and their modules.
    alphas: Vec<(String, String)>,
}

impl Names {
    fn plan(adapter: &Path, file: &TensorFile, config: &AdapterConfig, model: Option<&Model>) -> Result<Self> {
        let refuse = |why: String| Error::Repair { adapter: adapter.into(), why };
        let mut names = Names { tensors: BTreeMap::new(), updated: BTreeSet::new(), alphas: Vec::new() };
        let (mut owners, mut has_tokens) = (BTreeSet::new(), false);
        for name in file.names() {
            let Some((key, mut rules)) = repair_key(name) else {
                let why = format!("no known history explains the name of tensor `{name}`; rename it by hand");
                return Err(refuse(why));
            };
            owners.extend(rules.iter().filter_map(|rule| match rule {
                KeyRule::AdapterName(owner) => Some(owner.clone()),
                _ => None,
            }));
            let (module, end) = match key {
                RepairedKey::Tensor { module, end } => (module, Some(end)),
                RepairedKey::Alpha { module } => (module, None),
            };
            let module = match model {
                None => module,
                // The whole result is compared with the model before it appears.
                Some(_) if of_experts(config, &module) => module,
                Some(model) => at_home(&module, model, &mut rules).map_err(|why| refuse(format!("`{name}`: {why}")))?,
            };
            let Some(end) = end else {
                names.alphas.push((name.into(), module));
                continue;
            };
            let to = adapter_key(&module, &end);
            has_tokens |= end.contains("trainable_tokens_delta");
            if end.contains("lora_") {
                names.updated.insert(module);
            }
            if let Some((other, _)) = names.tensors.insert(to.clone(), (name.into(), rules)) {
                let why =
                    format!("tensors `{other}` and `{name}` would both be `{to}`; take out the one that is not wanted");
                return Err(refuse(why));
            }
        }
        if owners.len() > 1 {
            let owners = owners.into_iter().collect::<Vec<_>>().join(", ");
            return Err(refuse(format!("the file holds tensors of several adapters ({owners}); save each on its own")));
        }
        if names.updated.is_empty() && !has_tokens {
            return Err(refuse("the file holds no tensor of a LoRA adapter".into()));
        }
        Ok(names)
    }

    /// An alpha tensor must say what the configuration says: which of the two would be right, nobody could tell.
    fn check_alphas(&self, adapter: &Path, file: &TensorFile, config: &AdapterConfig) -> Result<()> {
        for (name, module) in &self.alphas {
            let refuse = |why: String| Error::Repair { adapter: adapter.into(), why };
            let tensor = file.read(name)?;
            if tensor.numel() != 1 {
                return Err(refuse(format!("tensor `{name}` has {} elements and is no alpha", tensor.numel())));
            }
            let (found, wanted) = (tensor.double_value(&[]), config.alpha_of(module)?);
            if found != wanted {
                let why = format!(
                    "tensor `{name}` is {found}, but the configuration gives the module lora_alpha {wanted}; set lora_alpha \
                     (or alpha_pattern) to what it was trained with"
                );
                return Err(refuse(why));
            }
        }
        Ok(())
    }

    /// The names for `target_modules`, if it lacks one of the modules that have an update.
    fn targets(&self, config: &AdapterConfig, model: Option<&Model>) -> Result<Option<Vec<String>>> {
        let Some(targets) = config.target_modules.as_ref().filter(|targets| !targets.is_all_linear()) else {
            return Ok(None);
        };
        // Stacked experts are named in target_parameters.
        let updated: Vec<&String> = self.updated.iter().filter(|module| !of_experts(config, module)).collect();
        let mut named = true;
        for module in &updated {
            named &= targets.matches(module)?;
        }
        if named {
            return Ok(None);
        }
        let leaf = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        updated.iter().for_each(|module| *counts.entry(leaf(module)).or_default() += 1);
        // A short name means every module of that name: where others have none, only whole paths are right.
        let everywhere = match model {
            Some(model) => counts.iter().all(|(name, n)| {
                let list = TargetModules::List(vec![name.clone()]);
                model.modules.iter().filter(|m| list.matches(m).unwrap_or(false)).count() == *n
            }),
            None => counts.values().collect::<BTreeSet<_>>().len() == 1,
        };
        Ok(Some(if everywhere { counts.into_keys().collect() } else { updated.into_iter().cloned().collect() }))
    }
}

/// Whether tensors at `module` are of a parameter of `target_parameters`, which PEFT names by what it wraps around it.
fn of_experts(config: &AdapterConfig, module: &str) -> bool {
    let module = module.strip_suffix(".base_layer").unwrap_or(module);
    let list = TargetModules::List(config.target_parameters.clone().unwrap_or_default());
    STACKED.iter().any(|parameter| list.matches(&format!("{module}.{parameter}")).unwrap_or(false))
}

/// The path of a module in the model.
fn at_home(module: &str, model: &Model, rules: &mut Vec<KeyRule>) -> std::result::Result<String, String> {
    match rehome(module, |path| model.modules.contains(path)) {
        Ok(None) => Ok(module.into()),
        Ok(Some((path, rule))) => {
            rules.push(rule);
            Ok(path)
        }
        Err(found) if found.is_empty() => {
            Err(format!("the model {} has no module `{module}`, by whatever path", model.base.dir().display()))
        }
        Err(found) => Err(format!("`{module}` could be {}; rename it by hand", found.join(" or "))),
    }
}

fn write(
    adapter: &Path,
    file: &TensorFile,
    names: &Names,
    repair: &Repair,
    model: Option<&Model>,
    out: &Path,
) -> Result<()> {
    let parent = make_parent(out)?;
    let staging = create_staging_dir(out)?;
    let mut plan = Vec::new();
    for (to, (from, _)) in &names.tensors {
        let info = file.info(from)?;
        plan.push((to.clone(), info.kind, info.shape.clone()));
    }
    plan.sort_by_key(|(_, kind, _)| std::cmp::Reverse(lora_torch::kind_bytes(*kind)));
    let mut metadata = file.metadata().clone();
    metadata.entry("format".into()).or_insert_with(|| "pt".into());
    let mut writer = TensorWriter::create(&staging.path().join(ADAPTER_WEIGHTS), &plan, &metadata)?;
    for (to, ..) in &plan {
        writer.put_bytes(to, file.bytes(&names.tensors[to].0)?)?;
    }
    writer.finish()?;
    let mut config = read_json_object(&adapter.join(ADAPTER_CONFIG))?;
    if let Some(targets) = &repair.targets {
        config.insert("target_modules".into(), json!(targets));
    }
    let text = format!("{:#}\n", Value::Object(config));
    write_atomic(&staging.path().join(ADAPTER_CONFIG), text.as_bytes())?;

    let unsound = |source: Error| Error::Unrepaired { adapter: adapter.into(), source: Box::new(source) };
    match model {
        None => drop(read_adapter(staging.path()).map_err(|e| unsound(e.into()))?),
        Some(model) => {
            Plan::make(&model.base, &model.config, &[staging.path().into()]).map_err(unsound)?;
        }
    }
    sync_dir(staging.path())?;
    std::fs::rename(staging.path(), out).map_err(|e| Error::io("rename to", out, e))?;
    // The staged folder has its final name now; there is nothing left to remove.
    let _ = staging.keep();
    Ok(sync_dir(&parent)?)
}
