//! Adapters of stacked parameters (`target_parameters`): the matrices of all experts in one tensor `[E, out, in]`, with one
//! A and one B for all of them.
//!
//! PEFT wraps a module once for each of its parameters, the first innermost, so that a file names wrappers
//! (`experts.base_layer.lora_A.weight`) and not parameters. Which one is meant follows from the order in which
//! transformers registers them.

use crate::adapter_config::AdapterConfig;
use crate::error::Result;
use crate::target::TargetModules;
use tch::{TchError, Tensor};

/// The parameters of a module of experts, in the order in which PEFT wraps them.
pub const STACKED: [&str; 2] = ["gate_up_proj", "down_proj"];
/// What a wrapper calls the module that it wraps.
const INNER: &str = ".base_layer";

/// What the tensors of a wrapper belong to.
pub(crate) enum Wrapped {
    /// A module, as ever.
    Module,
    /// A module whose `weight` is named in `target_parameters`.
    Weight,
    /// A stacked parameter, by its path.
    Stacked(String),
}

/// Finds out what the tensors at `path` belong to; `inner` tells whether there are tensors one wrapper further in.
pub(crate) fn wrapped(
    config: &AdapterConfig,
    path: &str,
    inner: bool,
) -> Result<std::result::Result<Wrapped, &'static str>> {
    let Some(targets) = config.target_parameters.as_deref().filter(|t| !t.is_empty()) else {
        return Ok(Ok(Wrapped::Module));
    };
    let (module, is_inner) = path.strip_suffix(INNER).map_or((path, false), |module| (module, true));
    let meant = |parameter: &str| {
        let path = format!("{module}.{parameter}");
        targets.iter().any(|t| path == *t || path.strip_suffix(t.as_str()).is_some_and(|rest| rest.ends_with('.')))
    };
    if let Some(t) = &config.target_modules
        && (t.is_all_linear() || t.matches(module)?)
        && !is_inner
        && !inner
    {
        return Ok(Ok(Wrapped::Module));
    }
    if meant("weight") && !is_inner {
        return Ok(Ok(Wrapped::Weight));
    }
    let of: Vec<&str> = STACKED.into_iter().filter(|p| meant(p)).collect();
    Ok(match (&of[..], is_inner, inner) {
        ([], ..) => Ok(Wrapped::Module),
        ([one], false, false) => Ok(Wrapped::Stacked(format!("{module}.{one}"))),
        ([first, _], true, _) => Ok(Wrapped::Stacked(format!("{module}.{first}"))),
        ([_, second], false, true) => Ok(Wrapped::Stacked(format!("{module}.{second}"))),
        ([_, _], false, false) => Err("target_parameters names two parameters of this module, and the file has one"),
        ([_], ..) => Err("target_parameters names one parameter of this module, and the file has two"),
        _ => Err("the module has more parameters than are known"),
    })
}

/// Where the tensors of a stacked parameter stand in a file: the path before `.lora_A.weight`. `has` tells whether another
/// parameter, by its path, has an adapter, too.
pub fn stacked_key(path: &str, has: impl Fn(&str) -> bool) -> String {
    let Some((module, parameter)) = path.rsplit_once('.') else { return path.into() };
    let [first, second] = STACKED;
    if parameter == first && has(&format!("{module}.{second}")) { format!("{module}{INNER}") } else { module.into() }
}

/// Whether a version of PEFT lays A and B of stacked parameters out the other way round: before 0.19, inputs were taken
/// for outputs. Versions that say nothing are older still.
pub(crate) fn is_turned(version: Option<&str>) -> bool {
    let Some(version) = version else { return true };
    let mut parts = version.split(['.', '+', '-']).map(|part| part.parse::<u32>().ok());
    match (parts.next().flatten(), parts.next().flatten()) {
        (Some(0), Some(minor)) => minor < 19,
        _ => false,
    }
}

/// The other layout of a stacked adapter: of `a` `[E · r, in]` and `b` `[out, r · E]` what PEFT before 0.19 writes for the
/// same update, and back.
///
/// # Shapes
/// The results are `[E · r, out]` and `[in, r · E]`.
///
/// # Errors
/// What libtorch reports for a shape that the rank does not divide.
pub fn turn_stacked(a: &Tensor, b: &Tensor, r: i64) -> std::result::Result<(Tensor, Tensor), TchError> {
    let (size_a, size_b) = (a.size(), b.size());
    let experts = size_a[0] / r.max(1);
    // [experts, r, in] and [out, r, experts]
    let (each_a, each_b) = (a.f_reshape([experts, r, size_a[1]])?, b.f_reshape([size_b[0], r, experts])?);
    let turned_a = each_b.f_permute([2, 1, 0])?.f_reshape([experts * r, size_b[0]])?;
    let turned_b = each_a.f_permute([2, 1, 0])?.f_reshape([size_a[1], r * experts])?;
    Ok((turned_a.f_contiguous()?, turned_b.f_contiguous()?))
}

/// Whether a stacked parameter, by its path, is among `target_parameters`.
pub(crate) fn is_target(config: &AdapterConfig, path: &str) -> bool {
    let targets = config.target_parameters.as_deref().unwrap_or_default();
    let list = TargetModules::List(targets.to_vec());
    list.matches(path).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tch::{Device, Kind};

    /// Sums of two products in another order, in float64.
    const SUM_TOLERANCE: f64 = 1e-12;

    #[test]
    fn versions_before_0_19_are_turned() {
        for version in [None, Some("0.18.1"), Some("0.17.0"), Some("0.18.2.dev0@abc")] {
            assert!(is_turned(version), "{version:?}");
        }
        for version in ["0.19.0", "0.19.0.dev0", "0.21.2", "1.0.0", "unknown"] {
            assert!(!is_turned(Some(version)), "{version}");
        }
    }

    #[test]
    fn turning_twice_changes_nothing_and_turning_once_transposes_the_update() {
        let (experts, r, input, output) = (3, 2, 4, 5);
        let a = Tensor::randn([experts * r, input], (Kind::Double, Device::Cpu));
        let b = Tensor::randn([output, r * experts], (Kind::Double, Device::Cpu));
        let (a1, b1) = turn_stacked(&a, &b, r).unwrap();
        assert_eq!((a1.size(), b1.size()), (vec![6, 5], vec![4, 6]));
        let update = |a: &Tensor, b: &Tensor| {
            let (a, b) = (a.view([experts, r, -1]), b.view([b.size()[0], r, experts]));
            Tensor::einsum("ore,eri->eoi", &[b, a], None::<&[i64]>)
        };
        assert!(update(&a1, &b1).transpose(1, 2).allclose(&update(&a, &b), SUM_TOLERANCE, SUM_TOLERANCE, false));
        let (a2, b2) = turn_stacked(&a1, &b1, r).unwrap();
        assert!(a2.equal(&a) && b2.equal(&b));
    }

    #[test]
    fn wrappers_are_named_by_the_parameters_and_parameters_by_the_wrappers() {
        let config = |targets: &[&str]| AdapterConfig {
            target_modules: Some(TargetModules::List(vec!["q_proj".into()])),
            target_parameters: Some(targets.iter().map(ToString::to_string).collect()),
            ..AdapterConfig::default()
        };
        let name = |targets: &[&str], path: &str, inner| match wrapped(&config(targets), path, inner).unwrap() {
            Ok(Wrapped::Stacked(path)) => path,
            Ok(Wrapped::Weight) => "weight".into(),
            Ok(Wrapped::Module) => "module".into(),
            Err(why) => why.into(),
        };
        let both = ["experts.gate_up_proj", "down_proj"];
        assert_eq!(name(&both, "l.0.experts", true), "l.0.experts.down_proj");
        assert_eq!(name(&both, "l.0.experts.base_layer", false), "l.0.experts.gate_up_proj");
        assert_eq!(name(&["experts.gate_up_proj"], "l.0.experts", false), "l.0.experts.gate_up_proj");
        assert_eq!(name(&["experts.gate_up_proj"], "l.0.other", false), "module");
        assert_eq!(name(&["gate.weight", "down_proj"], "l.0.gate", false), "weight");
        assert_eq!(name(&both, "l.0.q_proj", false), "module");
        assert!(name(&both, "l.0.experts", false).contains("the file has one"));
        assert!(name(&["down_proj"], "l.0.experts", true).contains("the file has two"));
        let has = |names: &'static [&str]| move |n: &str| names.contains(&n);
        assert_eq!(stacked_key("e.gate_up_proj", has(&["e.down_proj"])), "e.base_layer");
        assert_eq!(stacked_key("e.gate_up_proj", has(&[])), "e");
        assert_eq!(stacked_key("e.down_proj", has(&["e.gate_up_proj"])), "e");
    }
}
