//! The loop of the processes behind rank 0: its steps, and nothing that is written. They take part in whatever rank 0's loop
//! ([`crate::run`]) settles with them, in the same order.

use crate::error::Result;
use crate::events::{Event, EventSink};
use crate::run::{EndedBy, Until};
use crate::trainer::{StepOutcome, Trainer};

/// Trains along until rank 0's run ends.
pub(crate) fn steps_behind(trainer: &mut Trainer, until: &Until<'_>, sink: &mut dyn EventSink) -> Result<EndedBy> {
    let (team, total, config) =
        (trainer.team().clone(), trainer.plan().total_steps, trainer.plan().config.train.clone());
    // The step of the last evaluation.
    let mut evaluated = 0;
    if trainer.state().step == 0 {
        trainer.evaluate(sink)?;
    }
    let ended_by = loop {
        if let Some(ended_by) = until.ended(trainer, false) {
            break ended_by;
        }
        if let StepOutcome::Skipped { step, loss, grad_norm, rows } = trainer.step_asking(&|t| until.asks(t, false))? {
            sink.event(Event::Skipped { step, loss, grad_norm, rows });
        }
        let step = trainer.state().step;
        let due = |every: u64| every > 0 && step.is_multiple_of(every);
        if due(config.eval_steps) || step == total {
            trainer.evaluate(sink)?;
            evaluated = step;
        }
        if due(config.save_steps) {
            trainer.collect()?;
            team.agree(Ok(()))?;
        }
    };
    trainer.check_parameters()?;
    if trainer.is_staged() && matches!(ended_by, EndedBy::MaxTime | EndedBy::Hook) && evaluated != trainer.state().step
    {
        trainer.measure(sink)?;
    }
    trainer.collect()?;
    // Rank 0 saves and writes the result.
    team.agree(Ok(()))?;
    Ok(ended_by)
}
