//! The one exchange of a step: every process's gradients, and behind them in the same buffer what else it has to tell.

use crate::comparing::Tally;
use crate::error::{Error, Result};
use crate::params::FlatParams;
use crate::team::Team;
use tch::Tensor;

/// What ends a run from outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asks {
    /// It was asked to stop.
    pub(crate) stop: bool,
    /// Its time is over.
    pub(crate) out_of_time: bool,
    /// A hook of the caller has enough of it.
    pub(crate) enough: bool,
}

/// What a process, or all of them, computed in a step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Part {
    /// Tokens with a loss.
    pub(crate) trained: u64,
    /// Tokens.
    pub(crate) tokens: u64,
    /// What the loss is the mean over: trained tokens or texts, pairs or answers.
    pub(crate) count: u64,
    /// The summed loss.
    pub(crate) loss: f64,
    pub(crate) tally: Tally,
    pub(crate) asks: Asks,
    /// The squared norm of the gradients, where each process has those of other parameters.
    pub(crate) squares: Option<f64>,
}

/// A count is told in two numbers, so that its sum is exact in fp32 as well.
const LOW: u64 = 1 << 12;

impl Part {
    /// Numbers whose sums over all processes make the whole.
    fn numbers(&self) -> Vec<f64> {
        let counts = [self.trained, self.tokens, self.count].into_iter().flat_map(|n| [n / LOW, n % LOW]);
        let Asks { stop, out_of_time, enough } = self.asks;
        let asks = [stop, out_of_time, enough].map(|ask| f64::from(u8::from(ask)));
        let own = counts.map(|n| n as f64).chain([self.loss]).chain(asks);
        own.chain(self.tally.numbers()).collect()
    }

    fn of_numbers(numbers: &[f64]) -> Self {
        let at = |i: usize| numbers.get(i).copied().unwrap_or(0.0);
        let count = |i: usize| at(i) as u64 * LOW + at(i + 1) as u64;
        Self {
            trained: count(0),
            tokens: count(2),
            count: count(4),
            loss: at(6),
            asks: Asks { stop: at(7) > 0.0, out_of_time: at(8) > 0.0, enough: at(9) > 0.0 },
            tally: Tally::of_numbers(numbers.get(10..).unwrap_or_default()),
            squares: None,
        }
    }
}

/// Sums gradients and parts over all processes, and divides the gradients by the count of them all. A process that failed
/// takes part, too, so that nobody waits for it.
pub(crate) fn exchange<T>(team: &Team, params: &FlatParams, own: Result<(T, Part)>) -> Result<(T, Part)> {
    let (failed, numbers) = own.as_ref().map_or((1.0, Vec::new()), |(_, part)| (0.0, part.numbers()));
    let mut sums = Vec::new();
    let (own, _) = team.settle(own, |team| {
        params.tell(&[&[failed], numbers.as_slice()].concat())?;
        team.all_reduce_sum(&mut params.exchanged())?;
        sums = params.told()?;
        Ok::<_, Error>(sums.first().is_some_and(|failed| *failed > 0.0))
    })?;
    let whole = Part::of_numbers(sums.get(1..).unwrap_or_default());
    params.scale_grad(1.0 / whole.count as f64)?;
    Ok((own, whole))
}

/// Sums parts over the stages of a divided model, each of which has the gradients of its own parameters: what goes along are
/// their squared norms. What all stages know, the last alone tells.
pub(crate) fn join<T>(team: &Team, params: &FlatParams, own: Result<(T, Part)>) -> Result<(T, Part)> {
    let own = own.and_then(|(own, part)| Ok((own, part, params.grad_norm()?.powi(2))));
    let (failed, squares, part) =
        own.as_ref().map_or((1.0, 0.0, Part::default()), |(_, part, squares)| (0.0, *squares, *part));
    let told = match team.rank() + 1 == team.world() {
        true => part,
        false => Part { asks: part.asks, ..Part::default() },
    };
    let mut slots = Tensor::f_from_slice(&[&[failed, squares], told.numbers().as_slice()].concat())?;
    let (own, _, _) = team.settle(own, |team| {
        team.all_reduce_sum(&mut slots)?;
        Ok::<_, Error>(slots.f_double_value(&[0])? > 0.0)
    })?;
    let sums = Vec::<f64>::try_from(&slots)?;
    let whole = Part::of_numbers(sums.get(2..).unwrap_or_default());
    Ok((own, Part { squares: sums.get(1).copied(), ..whole }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Optim;
    use lora_model::Parameter;
    use lora_torch::distributed::{Gloo, Launch};
    use proptest::prelude::*;
    use std::net::TcpListener;
    use std::thread;
    use std::time::Duration;
    use tch::{Device, Kind, Tensor};

    proptest! {
        #[test]
        fn counts_survive_fp32_and_their_sum_is_that_of_all(a in 0u64..1 << 34, b in 0u64..1 << 34) {
            let part = |n| Part { trained: n, tokens: n / 3, count: n / 7, loss: 0.5, ..Part::default() };
            let fp32 = |part: Part| part.numbers().into_iter().map(|x| x as f32).collect::<Vec<_>>();
            let sums: Vec<f64> =
                fp32(part(a)).iter().zip(fp32(part(b))).map(|(x, y)| f64::from(x + y)).collect();
            let whole = Part::of_numbers(&sums);
            prop_assert_eq!(whole.trained, a + b);
            prop_assert_eq!(whole.tokens, a / 3 + b / 3);
            prop_assert_eq!(whole.count, a / 7 + b / 7);
            prop_assert!(whole.loss == 1.0 && whole.asks == Asks::default());
        }
    }

    #[test]
    fn a_process_that_fails_takes_part() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let member = move |rank: u32| {
            let address = "127.0.0.1".into();
            let launch = Launch { rank, world: 2, local_rank: rank, address, port, hosts: true, attempt: 0 };
            let team = Team::of(Gloo::connect(&launch, Duration::from_secs(120)).unwrap());
            let leaf = || Tensor::ones([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            let parameter = Parameter { name: "a".into(), tensor: leaf() };
            let params = FlatParams::new(vec![parameter], None, Optim::AdamW).unwrap();
            let part = Part { count: 3, trained: 4097, loss: f64::from(rank), ..Part::default() };
            let whole = exchange(&team, &params, Ok(((), part))).unwrap().1;
            assert_eq!((whole.count, whole.trained, whole.loss), (6, 8194, 1.0));
            let own = if rank == 1 { Err(Error::NothingTrained) } else { Ok(((), part)) };
            let error = exchange(&team, &params, own).unwrap_err();
            // What follows is an exchange like any other.
            exchange(&team, &params, Ok(((), part))).unwrap();
            error
        };
        let other = thread::spawn(move || member(1));
        let heard = member(0);
        assert!(
            matches!(heard, Error::Peer { rank: 1, ref message } if message.contains("nothing to train")),
            "{heard}"
        );
        assert!(matches!(other.join().unwrap(), Error::NothingTrained));
    }

    #[test]
    fn one_that_asks_is_enough() {
        let asks = |stop, enough| Asks { stop, out_of_time: false, enough };
        let numbers = |asks| Part { asks, ..Part::default() }.numbers();
        let (one, other) = (numbers(asks(true, false)), numbers(asks(false, true)));
        let sums: Vec<f64> = one.iter().zip(other).map(|(x, y)| x + y).collect();
        assert_eq!(Part::of_numbers(&sums).asks, asks(true, true));
    }
}
