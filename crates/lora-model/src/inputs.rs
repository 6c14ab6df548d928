//! What blocks read, until they are computed again: on the device, or away on the host.

use crate::error::Result;
use lora_torch::{Coming, OnHost};
use tch::Tensor;

/// What the blocks read that are computed again, in the order of the blocks; it is taken from the end. Where they wait on the host,
/// the newest stays on the device, which needs it first, and the one before any that is taken begins to come.
#[derive(Debug, Default)]
pub(crate) struct BlockInputs {
    send_away: bool,
    here: Vec<Tensor>,
    newest: Option<Tensor>,
    away: Vec<OnHost>,
    coming: Option<Coming>,
}

impl BlockInputs {
    /// For inputs that wait on the host, or that stay.
    pub(crate) fn new(send_away: bool) -> Self {
        Self { send_away, ..Self::default() }
    }

    pub(crate) fn push(&mut self, input: Tensor) -> Result<()> {
        if !self.send_away {
            self.here.push(input);
        } else if let Some(before) = self.newest.replace(input) {
            self.away.push(OnHost::send(&before)?);
        }
        Ok(())
    }

    /// What the last of the blocks read that are still to be computed again.
    pub(crate) fn pop(&mut self) -> Result<Option<Tensor>> {
        let input = match (self.newest.take(), self.coming.take()) {
            (Some(input), _) => input,
            (None, Some(coming)) => coming.arrive()?,
            (None, None) => return Ok(self.here.pop()),
        };
        self.coming = self.away.pop().map(|next| next.fetch()).transpose()?;
        Ok(Some(input))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.here.is_empty() && self.newest.is_none() && self.coming.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    #[test]
    fn the_last_comes_first_wherever_they_wait() {
        for send_away in [false, true] {
            let mut inputs = BlockInputs::new(send_away);
            for i in 0..4 {
                inputs.push(Tensor::from(i).to_kind(Kind::Float).to_device(Device::Cpu)).unwrap();
            }
            for i in (0..4).rev() {
                assert!(!inputs.is_empty());
                assert_eq!(inputs.pop().unwrap().unwrap().double_value(&[]), f64::from(i));
            }
            assert!(inputs.is_empty() && inputs.pop().unwrap().is_none());
        }
    }
}
