//! Which modules get an adapter: PEFT's rules, with a name that matches nothing an error and not a silence.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::names::{LM_HEAD, ModuleKind, ModuleSpec, modules};
use fancy_regex::Regex;
use lora_core::{LoraSpec, ParameterCount};
use lora_format::{AdapterConfig, TargetModules};

/// One adapter to be made.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedAdapter {
    /// The module that gets it.
    pub module: ModuleSpec,
    /// Its rank and scale, after the patterns.
    pub spec: LoraSpec,
}

/// What an adapter configuration means for a model, decided before any weight is read.
#[derive(Clone, Debug, PartialEq)]
pub struct InjectionPlan {
    /// The adapters, in the order of the forward pass.
    pub adapters: Vec<PlannedAdapter>,
    /// Modules that are trained and saved in full.
    pub saved: Vec<ModuleSpec>,
    /// The configuration as it will be saved; `all-linear` has become names.
    pub config: AdapterConfig,
}

impl InjectionPlan {
    /// Trained parameters of the adapters against the weights that they stand beside.
    pub fn count(&self) -> ParameterCount {
        self.adapters
            .iter()
            .map(|a| ParameterCount::of_linear(a.module.in_features, a.module.out_features, a.spec.r()))
            .sum()
    }

    /// All trained parameters, modules that are saved in full included.
    pub fn trained(&self) -> i64 {
        let full: i64 = self.saved.iter().flat_map(ModuleSpec::tensors).map(|(_, s)| s.iter().product::<i64>()).sum();
        self.count().trained + full
    }
}

/// Applies an adapter configuration to a model's module table.
///
/// # Errors
/// [`Error::Target`] for a name or pattern that matches nothing, [`Error::Adapter`] for what cannot be applied.
pub fn plan_injection(model: &ModelConfig, config: &AdapterConfig) -> Result<InjectionPlan> {
    let all = modules(model);
    let mut config = config.clone();
    if config.bias != "none" {
        let reason = "only bias = \"none\" is supported".to_string();
        return Err(Error::Adapter { field: "bias", value: config.bias, reason });
    }
    let saved = saved_modules(&all, config.modules_to_save.as_deref().unwrap_or_default())?;
    let targets = expand(&all, config.target_modules.as_ref());
    check_names("target_modules", &all, &targets)?;
    if let Some(exclude) = &config.exclude_modules {
        check_names("exclude_modules", &all, exclude)?;
    }
    let layers = LayerFilter::new(&config, &targets)?;

    let mut adapters = Vec::new();
    for module in all.iter().filter(|m| m.kind != ModuleKind::Norm) {
        let excluded = config.exclude_modules.as_ref().map_or(Ok(false), |e| e.matches(&module.path))?;
        if excluded
            || saved.iter().any(|s| s.path == module.path)
            || !targets.matches(&module.path)?
            || !layers.keeps(&module.path)
        {
            continue;
        }
        let (r, alpha) = (config.rank_of(&module.path)?, config.alpha_of(&module.path)?);
        let most = module.in_features.min(module.out_features);
        if r > most {
            let reason =
                format!("`{}` is {} wide on its smaller side, where a higher rank saves nothing", module.path, most);
            return Err(Error::Adapter { field: "r", value: r.to_string(), reason });
        }
        adapters.push(PlannedAdapter { module: module.clone(), spec: LoraSpec::new(r, alpha, config.use_rslora)? });
    }
    if adapters.is_empty() {
        let value = format!("{targets:?}");
        let reason = "no module is left after exclude_modules, modules_to_save and layers_to_transform".to_string();
        return Err(Error::Adapter { field: "target_modules", value, reason });
    }
    check_patterns("rank_pattern", config.rank_pattern.iter().map(|(k, _)| k), &adapters)?;
    check_patterns("alpha_pattern", config.alpha_pattern.iter().map(|(k, _)| k), &adapters)?;
    config.target_modules = Some(targets);
    Ok(InjectionPlan { adapters, saved, config })
}

/// `all-linear`, which is also the default, as names: every linear layer but the output head.
fn expand(all: &[ModuleSpec], targets: Option<&TargetModules>) -> TargetModules {
    match targets {
        Some(t) if !t.is_all_linear() => t.clone(),
        _ => {
            let mut names: Vec<String> = Vec::new();
            for m in all.iter().filter(|m| m.kind == ModuleKind::Linear && m.path != LM_HEAD) {
                let name = last_part(&m.path).to_string();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            TargetModules::List(names)
        }
    }
}

fn last_part(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// Every name of a list must match a module that can have an adapter, and a pattern at least one.
fn check_names(field: &'static str, all: &[ModuleSpec], targets: &TargetModules) -> Result<()> {
    let entries: Vec<(String, TargetModules)> = match targets {
        TargetModules::List(names) => names.iter().map(|n| (n.clone(), TargetModules::List(vec![n.clone()]))).collect(),
        TargetModules::Pattern(p) => vec![(p.clone(), targets.clone())],
    };
    if entries.is_empty() {
        let reason = "name at least one module, or \"all-linear\"".to_string();
        return Err(Error::Adapter { field, value: "[]".into(), reason });
    }
    for (value, entry) in entries {
        let mut norm = None;
        let mut found = false;
        for module in all {
            if entry.matches(&module.path)? {
                match module.kind {
                    ModuleKind::Norm => norm = Some(&module.path),
                    _ => found = true,
                }
            }
        }
        match (found, norm) {
            (true, _) => {}
            (false, Some(path)) => {
                let reason =
                    format!("`{path}` is a norm, which has no low-rank form; put it into modules_to_save to train it");
                return Err(Error::Adapter { field, value, reason });
            }
            (false, None) => {
                let nearest = nearest_names(all, &value);
                return Err(Error::Target { field, value, nearest });
            }
        }
    }
    Ok(())
}

/// `modules_to_save` matches by the end of the path, and each name must match.
fn saved_modules(all: &[ModuleSpec], names: &[String]) -> Result<Vec<ModuleSpec>> {
    for name in names {
        if !all.iter().any(|m| ends_with(&m.path, name)) {
            let nearest = nearest_names(all, name);
            return Err(Error::Target { field: "modules_to_save", value: name.clone(), nearest });
        }
    }
    Ok(all.iter().filter(|m| names.iter().any(|n| ends_with(&m.path, n))).cloned().collect())
}

fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Each key of a pattern table must say something about an adapter.
fn check_patterns<'a>(
    field: &'static str,
    keys: impl Iterator<Item = &'a String>,
    adapters: &[PlannedAdapter],
) -> Result<()> {
    for key in keys {
        let table = AdapterConfig { rank_pattern: vec![(key.clone(), -1)], ..AdapterConfig::default() };
        let mut hit = false;
        for a in adapters {
            hit |= table.rank_of(&a.module.path)? == -1;
        }
        if !hit {
            let specs: Vec<_> = adapters.iter().map(|a| a.module.clone()).collect();
            return Err(Error::Target { field, value: key.clone(), nearest: nearest_names(&specs, key) });
        }
    }
    Ok(())
}

/// The last parts of module paths that are closest to a name.
fn nearest_names(all: &[ModuleSpec], name: &str) -> Vec<String> {
    let mut parts: Vec<&str> = all.iter().filter(|m| m.kind != ModuleKind::Norm).map(|m| last_part(&m.path)).collect();
    parts.sort_unstable();
    parts.dedup();
    parts.sort_by_key(|p| strsim::damerau_levenshtein(p, last_part(name)));
    parts.into_iter().take(4).map(str::to_string).collect()
}

/// `layers_to_transform` and `layers_pattern`.
struct LayerFilter {
    layers: Option<Vec<i64>>,
    index: Vec<Regex>,
}

impl LayerFilter {
    fn new(config: &AdapterConfig, targets: &TargetModules) -> Result<Self> {
        let layers = config.layers_to_transform.clone();
        if layers.is_some() && matches!(targets, TargetModules::Pattern(_)) {
            let value = format!("{:?}", config.layers_to_transform);
            let reason =
                "it cannot be combined with a regex in target_modules; put the layers into the regex".to_string();
            return Err(Error::Adapter { field: "layers_to_transform", value, reason });
        }
        // The index is the whole number after one of the names, or the first in the path where none is given.
        let names = config.layers_pattern.clone().unwrap_or_default();
        let patterns: Vec<String> = if names.is_empty() {
            vec![r"^.*?\.[^.]*\.(\d+)\.".to_string()]
        } else {
            names.iter().map(|n| format!(r"^.*\.{}\.(\d+)\.", fancy_regex::escape(n))).collect()
        };
        let compile = |p: &String| {
            Regex::new(p).map_err(|e| Error::Adapter {
                field: "layers_pattern",
                value: p.clone(),
                reason: e.to_string(),
            })
        };
        Ok(Self { layers, index: patterns.iter().map(compile).collect::<Result<_>>()? })
    }

    fn keeps(&self, path: &str) -> bool {
        let Some(layers) = &self.layers else { return true };
        let number = |r: &Regex| r.captures(path).ok()??.get(1)?.as_str().parse::<i64>().ok();
        self.index.iter().find_map(number).is_some_and(|i| layers.contains(&i))
    }
}
