//! Which triplets of AdaLoRA stay: their importance, the budget, and the pruning (sections 3.2 and 3.3 of the paper), with
//! the order of operations of PEFT's `RankAllocator`.

use crate::error::{Error, Result};
use std::collections::BTreeMap;
use tch::{Kind, Tensor, no_grad};

/// How many triplets there may be at each step (equation 12).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetSchedule {
    /// Triplets in all at the start.
    pub initial: i64,
    /// Triplets in all at the end.
    pub target: i64,
    /// The last step, from 0, at which the budget is still the initial one.
    pub tinit: i64,
    /// Steps at the end in which the ranks stay as they are.
    pub tfinal: i64,
    /// Triplets are pruned at multiples of this.
    pub delta_t: i64,
    /// Steps of the whole training.
    pub total_step: i64,
}

impl BudgetSchedule {
    /// The budget at a step (from 0), and whether the schedule prunes to it then.
    pub fn at(&self, step: i64) -> (i64, bool) {
        if step <= self.tinit {
            return (self.initial, false);
        }
        if step > self.last() {
            return (self.target, true);
        }
        let left = 1.0 - (step - self.tinit) as f64 / (self.last() - self.tinit) as f64;
        let budget = (self.initial - self.target) as f64 * left.powi(3) + self.target as f64;
        (budget as i64, step % self.delta_t.max(1) == 0)
    }

    /// The step at which the ranks are settled.
    pub fn last(&self) -> i64 {
        self.total_step - self.tfinal
    }
}

/// The leaves of one module.
#[derive(Debug)]
pub struct Triplets {
    /// The module's path, by which its part of the state is named.
    pub module: String,
    /// `[r, in_features]`
    pub a: Tensor,
    /// `[out_features, r]`
    pub b: Tensor,
    /// `[r, 1]`
    pub e: Tensor,
}

/// Smoothed importance of the numbers of one tensor.
#[derive(Debug)]
struct Importance {
    /// The name in a state: `MODULE.lora_A`.
    name: String,
    tensor: Tensor,
    /// The moving mean of the sensitivity `|w ∂L/∂w|` (equation 9).
    sensitivity: Tensor,
    /// The moving mean of its uncertainty (equation 10).
    uncertainty: Tensor,
}

impl Importance {
    fn of(module: &str, part: &str, tensor: &Tensor) -> Result<Self> {
        let tensor = tensor.shallow_clone();
        let zeros = tensor.f_detach()?.f_zeros_like()?;
        let uncertainty = zeros.f_zeros_like()?;
        Ok(Self { name: format!("{module}.{part}"), tensor, sensitivity: zeros, uncertainty })
    }

    fn update(&mut self, beta1: f64, beta2: f64) -> Result<()> {
        let now = self.tensor.f_mul(&self.tensor.f_grad()?)?.f_abs()?.f_detach()?;
        let smoothed = |mean: &Tensor, new: &Tensor, beta: f64| -> Result<Tensor> {
            Ok(mean.f_mul_scalar(beta)?.f_add(&new.f_mul_scalar(1.0 - beta)?)?)
        };
        self.sensitivity = smoothed(&self.sensitivity, &now, beta1)?;
        let surprise = now.f_sub(&self.sensitivity)?.f_abs()?;
        self.uncertainty = smoothed(&self.uncertainty, &surprise, beta2)?;
        Ok(())
    }

    /// Equation 11.
    fn score(&self) -> Result<Tensor> {
        Ok(self.sensitivity.f_mul(&self.uncertainty)?)
    }

    fn reset(&mut self) -> Result<()> {
        for t in [&mut self.sensitivity, &mut self.uncertainty] {
            *t = t.f_zeros_like()?;
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Module {
    path: String,
    /// A, B and E.
    parts: [Importance; 3],
    /// `[r]` bool: the triplets that are left, once some were pruned.
    kept: Option<Tensor>,
}

impl Module {
    /// The importance of each triplet, `[r]` (equation 7): its singular value's and the means over its vectors.
    fn scores(&self) -> Result<Tensor> {
        let [a, b, e] = &self.parts;
        let mean = |t: Tensor, dim: i64| -> Result<Tensor> {
            Ok(t.f_mean_dim([dim].as_slice(), false, t.kind())?.f_view([-1, 1])?)
        };
        let vectors = Tensor::f_cat(&[mean(a.score()?, 1)?, mean(b.score()?, 0)?], 1)?;
        let vectors = vectors.f_sum_dim_intlist([1i64].as_slice(), false, vectors.kind())?;
        Ok(e.score()?.f_view([-1])?.f_add(&vectors)?)
    }

    fn mask(&self) -> Result<()> {
        let Some(kept) = &self.kept else { return Ok(()) };
        let gone = kept.f_logical_not()?.f_unsqueeze(1)?;
        let _e = self.parts[2].tensor.f_detach()?.f_masked_fill_(&gone, 0.0)?;
        Ok(())
    }
}

/// What an allocation came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allocation {
    /// Triplets that the schedule allows.
    pub budget: i64,
    /// Whether triplets were chosen anew.
    pub pruned: bool,
}

/// Of each module by name, which triplets are left.
pub type KeptTriplets = Vec<(String, Vec<bool>)>;

/// Follows the importance of all triplets and prunes them to the budget.
#[derive(Debug)]
pub struct RankAllocator {
    modules: Vec<Module>,
    schedule: BudgetSchedule,
    beta1: f64,
    beta2: f64,
}

impl RankAllocator {
    /// Follows these leaves down to `target_r` triplets in the mean. `schedule`'s own numbers of triplets are set here.
    ///
    /// # Errors
    /// [`Error::Value`] for a beta outside (0, 1), a target that is not below the start, or a schedule without a phase of
    /// pruning.
    pub fn new(
        triplets: Vec<Triplets>,
        target_r: i64,
        schedule: BudgetSchedule,
        beta1: f64,
        beta2: f64,
    ) -> Result<Self> {
        let value = |what, value: String, expected| Err(Error::Value { what, value, expected });
        for (what, beta) in [("beta1", beta1), ("beta2", beta2)] {
            if !(beta > 0.0 && beta < 1.0) {
                return value(what, beta.to_string(), "above 0 and below 1");
            }
        }
        let initial: i64 = triplets.iter().map(|t| t.a.size()[0]).sum();
        let target = target_r * triplets.len() as i64;
        if target >= initial {
            return value("target_r", target_r.to_string(), "below init_r, or nothing is pruned");
        }
        let schedule = BudgetSchedule { initial, target, ..schedule };
        if schedule.tinit >= schedule.last() {
            return value("tinit", schedule.tinit.to_string(), "below total_step - tfinal, or nothing is pruned");
        }
        let module = |t: Triplets| -> Result<Module> {
            let of = |part, tensor| Importance::of(&t.module, part, tensor);
            let parts = [of("lora_A", &t.a)?, of("lora_B", &t.b)?, of("lora_E", &t.e)?];
            Ok(Module { path: t.module, parts, kept: None })
        };
        let modules = triplets.into_iter().map(module).collect::<Result<_>>()?;
        Ok(Self { modules, schedule, beta1, beta2 })
    }

    /// The part of a training step (from 0) that comes after the optimizer's and before gradients are cleared.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn step(&mut self, step: i64) -> Result<Allocation> {
        no_grad(|| {
            let (budget, due) = self.schedule.at(step);
            let last = self.schedule.last();
            let mut pruned = false;
            if step < last {
                let (beta1, beta2) = (self.beta1, self.beta2);
                self.parts_mut().try_for_each(|p| p.update(beta1, beta2))?;
            }
            if step <= last && (due || step == last) {
                self.prune(budget)?;
                pruned = true;
            }
            if step == last {
                self.parts_mut().try_for_each(Importance::reset)?;
            }
            if step > last {
                self.modules.iter().try_for_each(Module::mask)?;
            }
            Ok(Allocation { budget, pruned })
        })
    }

    /// Keeps the `budget` most important triplets; those that are no more important than the best of the others go, too.
    fn prune(&mut self, budget: i64) -> Result<()> {
        let scores: Vec<Tensor> = self.modules.iter().map(Module::scores).collect::<Result<_>>()?;
        let all = Tensor::f_cat(&scores, 0)?;
        let (threshold, _) = all.f_kthvalue(self.schedule.initial - budget, 0, false)?;
        for (module, scores) in self.modules.iter_mut().zip(&scores) {
            module.kept = Some(scores.f_gt_tensor(&threshold)?);
            module.mask()?;
        }
        Ok(())
    }

    fn parts_mut(&mut self) -> impl Iterator<Item = &mut Importance> {
        self.modules.iter_mut().flat_map(|m| &mut m.parts)
    }

    /// Which triplets of each module are left, in PEFT's `rank_pattern`; `None` before the first allocation.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn rank_pattern(&self) -> Result<Option<KeptTriplets>> {
        let of = |m: &Module| -> Result<Option<(String, Vec<bool>)>> {
            let Some(kept) = &m.kept else { return Ok(None) };
            Ok(Some((m.path.clone(), Vec::<bool>::try_from(kept)?)))
        };
        self.modules.iter().map(of).collect()
    }

    /// Everything that goes on from step to step, by name: `exp_avg_ipt.MODULE.lora_A`, `exp_avg_unc.MODULE.lora_A`, and
    /// `rank_pattern.MODULE` (one number for each triplet, 1 where it is left).
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn state(&self) -> Result<Vec<(String, Tensor)>> {
        let mut list = Vec::new();
        for module in &self.modules {
            for part in &module.parts {
                list.push((format!("exp_avg_ipt.{}", part.name), part.sensitivity.shallow_clone()));
                list.push((format!("exp_avg_unc.{}", part.name), part.uncertainty.shallow_clone()));
            }
            if let Some(kept) = &module.kept {
                list.push((format!("rank_pattern.{}", module.path), kept.f_to_kind(Kind::Float)?));
            }
        }
        Ok(list)
    }

    /// Takes its part of a state back out of `state`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a tensor that is missing or of another shape.
    pub fn take_state(&mut self, state: &mut BTreeMap<String, Tensor>) -> Result<()> {
        let misfit = |expected: &[i64], got: Option<&Tensor>| Error::Shape {
            what: "the importance of an adapter's numbers",
            expected: format!("{expected:?}"),
            got: got.map_or("missing".into(), |t| format!("{:?}", t.size())),
        };
        for module in &mut self.modules {
            for part in &mut module.parts {
                for (prefix, home) in [("exp_avg_ipt", &mut part.sensitivity), ("exp_avg_unc", &mut part.uncertainty)] {
                    let found = state.remove(&format!("{prefix}.{}", part.name));
                    match found.filter(|t| t.size() == home.size()) {
                        Some(t) => *home = t.f_to_device(home.device())?.f_to_kind(home.kind())?,
                        None => return Err(misfit(&home.size(), None)),
                    }
                }
            }
            module.kept = match state.remove(&format!("rank_pattern.{}", module.path)) {
                None => None,
                Some(t) if t.numel() == module.parts[2].tensor.numel() => {
                    Some(t.f_to_device(module.parts[2].tensor.device())?.f_to_kind(Kind::Bool)?)
                }
                Some(t) => return Err(misfit(&[module.parts[2].tensor.numel() as i64], Some(&t))),
            };
        }
        Ok(())
    }
}
