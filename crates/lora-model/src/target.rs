//! Which modules get an adapter: PEFT's rules, with a name that matches nothing an error and not a silence.

use crate::config::ModelConfig;
use crate::error::{Error, Result};
use crate::inject::Start;
use crate::names::{ModuleKind, ModuleSpec, modules};
use crate::stacked::{PlannedStack, plan_stacked};
use crate::tokens::{TokenPlan, check_alone, plan_tokens};
use fancy_regex::Regex;
use lora_core::{LoraSpec, ParameterCount, Principal};
use lora_format::{AdapterConfig, CLASSIFIER_TASK, InitLoraWeights, Method, TargetModules, TokenIndices};

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
    /// Numbers in biases of the base that are trained (`bias`).
    pub biases: i64,
    /// Adapters of stacked experts (`target_parameters`).
    pub stacked: Vec<PlannedStack>,
    /// Rows of single tokens (`trainable_token_indices`).
    pub tokens: Option<TokenPlan>,
    /// The configuration with which training starts; `all-linear` has become names.
    pub config: AdapterConfig,
}

impl InjectionPlan {
    /// Trained parameters of the adapters against the weights that they stand beside.
    pub fn count(&self) -> ParameterCount {
        let of = |a: &PlannedAdapter| {
            let (i, o, r) = (a.module.in_features, a.module.out_features, a.spec.r());
            let plain = ParameterCount::of_linear(i, o, r);
            match &self.config.method {
                Method::Lora => plain,
                Method::Vera(_) => ParameterCount { trained: r + o, ..plain },
                Method::AdaLora(_) => ParameterCount { trained: plain.trained + r, ..plain },
            }
        };
        let stacked = |p: &PlannedStack| {
            let one = ParameterCount::of_linear(p.stack.in_features, p.stack.out_features, p.spec.r());
            ParameterCount { trained: p.stack.experts * one.trained, full: p.stack.experts * one.full }
        };
        self.adapters.iter().map(of).chain(self.stacked.iter().map(stacked)).sum()
    }

    /// All trained parameters, modules that are saved in full included.
    pub fn trained(&self) -> i64 {
        let full: i64 = self.saved.iter().flat_map(ModuleSpec::tensors).map(|(_, s)| s.iter().product::<i64>()).sum();
        let vectors = |a: &PlannedAdapter| {
            let biased = self.config.lora_bias && a.module.kind == ModuleKind::Linear;
            a.module.out_features * (i64::from(self.config.use_dora) + i64::from(biased))
        };
        let tokens = self.tokens.as_ref().map_or(0, TokenPlan::trained);
        self.count().trained + full + tokens + self.biases + self.adapters.iter().map(vectors).sum::<i64>()
    }
}

/// The configuration under which [`Decoder::adapter_modules`](crate::Decoder::adapter_modules) is saved: an adapter that
/// began as a part of the base becomes a plain one of twice the rank and the same scale ([`lora_core::Lora::converted`]).
pub fn saved_form(mut config: AdapterConfig) -> AdapterConfig {
    let InitLoraWeights::Named(name) = &config.init_lora_weights else { return config };
    if Principal::named(name).is_none() {
        return config;
    }
    let alpha = if config.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
    config.r *= 2;
    config.lora_alpha *= alpha;
    config.rank_pattern.iter_mut().for_each(|(_, r)| *r *= 2);
    config.alpha_pattern.iter_mut().for_each(|(_, a)| *a *= alpha);
    config.init_lora_weights = InitLoraWeights::Default;
    config
}

/// The word in `target_modules` for what PEFT targets in this family when nothing is said.
const PEFT_DEFAULT: &str = "peft-default";

fn has_low_rank_form(module: &ModuleSpec) -> bool {
    matches!(module.kind, ModuleKind::Linear | ModuleKind::Embedding)
}

/// How many numbers of biases `bias` trains beside modules that are trained in full.
fn trained_biases(all: &[ModuleSpec], adapters: &[PlannedAdapter], saved: &[ModuleSpec], which: &str) -> i64 {
    let adapted = |m: &ModuleSpec| adapters.iter().any(|a| a.module.path == m.path);
    all.iter()
        .filter(|m| m.bias && !saved.iter().any(|s| s.path == m.path))
        .filter(|m| which == "all" || (which == "lora_only" && adapted(m)))
        .map(|m| m.out_features)
        .sum()
}

/// Applies an adapter configuration to a model's module table.
///
/// # Errors
/// [`Error::Target`] for a name or pattern that matches nothing, [`Error::Adapter`] for what cannot be applied.
pub fn plan_injection(model: &ModelConfig, config: &AdapterConfig) -> Result<InjectionPlan> {
    let all = modules(model);
    let mut config = config.clone();
    check_method(&config)?;
    check_task(model, &mut config)?;
    let saved = saved_modules(&all, config.modules_to_save.as_deref().unwrap_or_default())?;
    let targets = expand(model, &all, config.target_modules.as_ref())?;
    let (stacked, tokens) = (plan_stacked(model, &config)?, plan_tokens(model, &config)?);
    // Experts or tokens can be all that is trained.
    let no_module = matches!(&targets, TargetModules::List(names) if names.is_empty());
    if !no_module || (stacked.is_empty() && tokens.is_none()) {
        check_names("target_modules", &all, &targets)?;
    }
    if let Some(exclude) = &config.exclude_modules {
        check_names("exclude_modules", &all, exclude)?;
    }
    let layers = LayerFilter::new(&config, &targets)?;

    let mut adapters = Vec::new();
    for module in all.iter().filter(|m| has_low_rank_form(m)) {
        let excluded = config.exclude_modules.as_ref().map_or(Ok(false), |e| e.matches(&module.path))?;
        if excluded
            || saved.iter().any(|s| s.path == module.path)
            || !targets.matches(&module.path)?
            || !layers.keeps(&module.path)
        {
            continue;
        }
        if module.kind != ModuleKind::Linear && config.method != Method::Lora {
            let reason = format!(
                "`{}` is an embedding, and {} adapts linear layers only; name it in modules_to_save to train it whole",
                module.path,
                config.method.peft_type()
            );
            return Err(Error::Adapter { field: "target_modules", value: last_part(&module.path).into(), reason });
        }
        let in_block = module.path.starts_with(&format!("{}.", model.layout.layers));
        if config.loftq_iterations().is_some() && !(module.kind == ModuleKind::Linear && in_block) {
            let reason = format!(
                "`{}` is no linear layer of a block, which alone are packed; name it in modules_to_save to train it whole",
                module.path
            );
            return Err(Error::Adapter { field: "target_modules", value: last_part(&module.path).into(), reason });
        }
        let (r, alpha) = (config.rank_of(&module.path)?, config.alpha_of(&module.path)?);
        let most = module.in_features.min(module.out_features);
        // What VeRA trains hardly grows with its rank.
        if r > most && !matches!(config.method, Method::Vera(_)) {
            let reason =
                format!("`{}` is {} wide on its smaller side, where a higher rank saves nothing", module.path, most);
            let field = if config.method == Method::Lora { "r" } else { "init_r" };
            return Err(Error::Adapter { field, value: r.to_string(), reason });
        }
        adapters.push(PlannedAdapter { module: module.clone(), spec: LoraSpec::new(r, alpha, config.use_rslora)? });
    }
    if adapters.is_empty() && !no_module {
        let value = format!("{targets:?}");
        let reason = "no module is left after exclude_modules, modules_to_save and layers_to_transform".to_string();
        return Err(Error::Adapter { field: "target_modules", value, reason });
    }
    check_combined(model, &config, &adapters, &saved, (&stacked, tokens.as_ref()))?;
    check_patterns("rank_pattern", config.rank_pattern.iter().map(|(k, _)| k), &adapters, &stacked)?;
    check_patterns("alpha_pattern", config.alpha_pattern.iter().map(|(k, _)| k), &adapters, &stacked)?;
    config.target_modules = Some(targets);
    // Tokens alone are saved with the path of the table, as PEFT saves them: its name differs from family to family.
    if let (true, Some(TokenIndices::Embedding(ids))) = (config.is_tokens_alone(), &config.trainable_token_indices) {
        let named = vec![(model.layout.embed_tokens.to_string(), ids.clone())];
        config.trainable_token_indices = Some(TokenIndices::ByModule(named));
    }
    // PEFT's flag is that of the last linear layer it wraps.
    let linear = adapters.iter().rev().find(|a| a.module.kind == ModuleKind::Linear);
    config.fan_in_fan_out = linear.is_some_and(|a| a.module.transposed);
    let biases = trained_biases(&all, &adapters, &saved, &config.bias);
    Ok(InjectionPlan { adapters, saved, biases, stacked, tokens, config })
}

/// `all-linear`, which is also the default, as names: every linear layer but the output head and, in families with
/// experts, those of the MLPs, which PEFT holds as other adapters than these.
fn expand(model: &ModelConfig, all: &[ModuleSpec], targets: Option<&TargetModules>) -> Result<TargetModules> {
    match targets {
        Some(TargetModules::Pattern(word)) if word == PEFT_DEFAULT => match model.layout.peft_targets {
            Some(names) => Ok(TargetModules::List(names.iter().map(|n| (*n).to_string()).collect())),
            None => Err(Error::Adapter {
                field: "target_modules",
                value: PEFT_DEFAULT.into(),
                reason: format!("PEFT has no default for {}; use \"all-linear\", or name modules", model.family),
            }),
        },
        Some(t) if !t.is_all_linear() => Ok(t.clone()),
        _ => {
            let mut names: Vec<String> = Vec::new();
            for m in all.iter().filter(|m| m.in_all_linear) {
                let name = last_part(&m.path).to_string();
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            Ok(TargetModules::List(names))
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
        let mut without = None;
        let mut found = false;
        for module in all {
            if entry.matches(&module.path)? {
                match has_low_rank_form(module) {
                    false => without = Some(module),
                    true => found = true,
                }
            }
        }
        match (found, without) {
            (true, _) => {}
            (false, Some(module)) => {
                let kind = if module.kind == ModuleKind::Router { "router" } else { "norm" };
                let reason = format!(
                    "`{}` is a {kind}, which has no low-rank form; put it into modules_to_save to train it",
                    module.path
                );
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

/// Methods that cannot stand together, and starts that are not known.
fn check_method(config: &AdapterConfig) -> Result<()> {
    if config.use_dora && config.lora_bias {
        let reason = "DoRA has no bias of its own; choose use_dora or lora_bias".to_string();
        return Err(Error::Adapter { field: "lora_bias", value: "true".into(), reason });
    }
    let refuse = |field, value: String, reason: &str| {
        let reason = format!("{} {reason}", config.method.peft_type());
        Err(Error::Adapter { field, value, reason })
    };
    if config.method != Method::Lora {
        if config.bias != "none" {
            return refuse("bias", config.bias.clone(), "trains no biases of the base; use \"none\"");
        }
        if config.init_lora_weights != InitLoraWeights::Default {
            let value = format!("{:?}", config.init_lora_weights);
            return refuse("init_lora_weights", value, "begins in its own way; leave it at true");
        }
        for (field, given) in
            [("use_dora", config.use_dora), ("use_rslora", config.use_rslora), ("lora_bias", config.lora_bias)]
        {
            if given {
                return refuse(field, "true".into(), "cannot be combined with it; choose one of them");
            }
        }
        for (field, given) in [
            ("trainable_token_indices", config.trainable_token_indices.is_some()),
            ("target_parameters", config.has_target_parameters()),
        ] {
            if given {
                return refuse(field, "given".into(), "is not combined with it; train it as a LORA adapter");
            }
        }
        if !config.rank_pattern.is_empty() || !config.alpha_pattern.is_empty() {
            let field = if config.rank_pattern.is_empty() { "alpha_pattern" } else { "rank_pattern" };
            return refuse(field, "a table".into(), "has one rank and one scale for all modules; remove it");
        }
    }
    match &config.method {
        Method::Vera(_) if config.exclude_modules.is_some() => {
            refuse("exclude_modules", "given".into(), "has no such key in PEFT; name the modules that are meant")
        }
        Method::AdaLora(a) if a.target_r >= a.init_r => {
            let reason =
                format!("begins with init_r = {} triplets, so nothing would be pruned; use a smaller one", a.init_r);
            refuse("target_r", a.target_r.to_string(), &reason)
        }
        Method::AdaLora(a) if a.total_step.is_some_and(|total| a.tinit >= total - a.tfinal) => {
            let total = a.total_step.unwrap_or_default();
            let reason =
                format!("leaves no step to prune in: tinit must be below total_step - tfinal = {total} - {}", a.tfinal);
            refuse("tinit", a.tinit.to_string(), &reason)
        }
        _ => Start::of(config).map(|_| ()),
    }
}

/// The modules that PEFT saves in full for a classifier, whichever of them a model has.
const CLASSIFIER_MODULES: [&str; 2] = ["classifier", "score"];

/// The task is the model's own; that of a classifier saves its head.
fn check_task(model: &ModelConfig, config: &mut AdapterConfig) -> Result<()> {
    let task = config.task_type.clone().unwrap_or_default();
    match (&model.labels, task == CLASSIFIER_TASK) {
        (Some(_), true) => {
            let saved = config.modules_to_save.get_or_insert_default();
            saved.extend(
                CLASSIFIER_MODULES
                    .iter()
                    .filter(|m| !saved.iter().any(|s| s == *m))
                    .map(|m| (*m).to_string())
                    .collect::<Vec<_>>(),
            );
            Ok(())
        }
        (Some(_), false) => {
            let reason = format!("this {} model has a classification head; use \"{CLASSIFIER_TASK}\"", model.family);
            Err(Error::Adapter { field: "task_type", value: task, reason })
        }
        (None, true) => {
            let reason = format!("this {} model has no classification head", model.family);
            Err(Error::Adapter { field: "task_type", value: task, reason })
        }
        (None, false) => Ok(()),
    }
}

/// What cannot stand beside stacked experts and trained tokens.
fn check_combined(
    model: &ModelConfig,
    config: &AdapterConfig,
    adapters: &[PlannedAdapter],
    saved: &[ModuleSpec],
    (stacked, tokens): (&[PlannedStack], Option<&TokenPlan>),
) -> Result<()> {
    let refuse = |field, value: String, reason: &str| Err(Error::Adapter { field, value, reason: reason.into() });
    if !stacked.is_empty() {
        let by_inputs =
            "target_parameters changes a bare parameter, which sees no inputs; leave it out, or target modules";
        if config.lora_dropout > 0.0 {
            return refuse("lora_dropout", config.lora_dropout.to_string(), by_inputs);
        }
        let excluded = [("use_dora", config.use_dora), ("lora_bias", config.lora_bias)];
        if let Some((field, _)) = excluded.into_iter().find(|(_, is)| *is) {
            return refuse(
                field,
                "true".into(),
                "PEFT knows it not for target_parameters; leave it out, or target modules",
            );
        }
        if let InitLoraWeights::Named(name) = &config.init_lora_weights
            && name != "gaussian"
        {
            let reason = "target_parameters begins beside the base only: true, false or \"gaussian\"";
            return refuse("init_lora_weights", name.clone(), reason);
        }
        let experts = model.layout.experts.map(|e| format!(".{}.", e.experts)).unwrap_or_default();
        let single = |m: &&ModuleSpec| m.path.contains(&experts);
        if let Some(m) = adapters.iter().map(|a| &a.module).chain(saved).find(single) {
            let reason = "single experts and target_parameters exclude each other; keep one of them";
            return refuse("target_parameters", m.path.clone(), reason);
        }
    }
    let Some(tokens) = tokens else { return Ok(()) };
    if config.is_tokens_alone() && tokens.head.is_some() && tokens.embedding.as_ref() != tokens.head.as_ref() {
        let alone = tokens.embedding.is_none();
        if !alone {
            let reason =
                "PEFT keeps tokens without a target only where they are the same in all modules; name a target";
            return refuse("trainable_token_indices", format!("{:?}", config.trainable_token_indices), reason);
        }
    }
    let has = |path: &str| adapters.iter().map(|a| &a.module).chain(saved).any(|m| m.path == path);
    check_alone(tokens, model, has)
}

/// `modules_to_save` matches by the end of the path of a module, or of one that it lies in, and each name must match.
fn saved_modules(all: &[ModuleSpec], names: &[String]) -> Result<Vec<ModuleSpec>> {
    let found = |m: &ModuleSpec, name: &str| {
        let ends = m.path.match_indices('.').map(|(at, _)| at).chain([m.path.len()]);
        ends.map(|end| &m.path[..end]).any(|path| ends_with(path, name))
    };
    for name in names.iter().filter(|name| !CLASSIFIER_MODULES.contains(&name.as_str())) {
        if !all.iter().any(|m| found(m, name)) {
            let nearest = nearest_names(all, name);
            return Err(Error::Target { field: "modules_to_save", value: name.clone(), nearest });
        }
    }
    Ok(all.iter().filter(|m| names.iter().any(|n| found(m, n))).cloned().collect())
}

fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Each key of a pattern table must say something about an adapter.
fn check_patterns<'a>(
    field: &'static str,
    keys: impl Iterator<Item = &'a String>,
    adapters: &[PlannedAdapter],
    stacked: &[PlannedStack],
) -> Result<()> {
    for key in keys {
        let table = AdapterConfig { rank_pattern: vec![(key.clone(), -1)], ..AdapterConfig::default() };
        let mut hit = false;
        for a in adapters {
            hit |= table.rank_of(&a.module.path)? == -1;
        }
        for s in stacked {
            hit |= table.rank_of(&s.stack.path)? == -1;
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
    let mut parts: Vec<&str> = all.iter().filter(|m| has_low_rank_form(m)).map(|m| last_part(&m.path)).collect();
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
