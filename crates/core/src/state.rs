//! States of a request and the transitions between them.

use std::str::FromStr;

use strum::{Display, IntoStaticStr, VariantArray};

/// State of a request.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Display, IntoStaticStr, VariantArray,
)]
#[strum(serialize_all = "SCREAMING_SNAKE_CASE")]
pub enum RequestState {
    /// Stored, and waiting to run.
    Queued,
    /// An attempt is running.
    Running,
    /// Completed with a result.
    Succeeded,
    /// Completed with an error.
    Failed,
    /// Cancelled.
    Cancelled,
}

impl RequestState {
    /// All states, in the order of a request's life cycle.
    pub const ALL: &'static [Self] = Self::VARIANTS;

    /// Returns whether the state is terminal: no transition leaves it.
    #[must_use]
    pub const fn is_terminal(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }

    /// Returns whether a request may change from this state to `next`.
    #[must_use]
    pub const fn can_transition_to(self, next: Self) -> bool {
        match self {
            Self::Queued => matches!(next, Self::Running | Self::Failed | Self::Cancelled),
            Self::Running => {
                matches!(next, Self::Queued | Self::Succeeded | Self::Failed | Self::Cancelled)
            }
            Self::Succeeded | Self::Failed | Self::Cancelled => false,
        }
    }

    /// Returns the name that the protocols use, such as `QUEUED`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.into()
    }
}

/// Error returned for a text that is not the name of a state.
#[derive(Debug, thiserror::Error)]
#[error("must be QUEUED, RUNNING, SUCCEEDED, FAILED or CANCELLED")]
pub struct InvalidState;

impl FromStr for RequestState {
    type Err = InvalidState;

    fn from_str(text: &str) -> Result<Self, InvalidState> {
        Self::ALL
            .iter()
            .copied()
            .find(|state| state.as_str().eq_ignore_ascii_case(text))
            .ok_or(InvalidState)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_transition_leaves_a_terminal_state() {
        for from in RequestState::ALL {
            let has_transition = RequestState::ALL.iter().any(|next| from.can_transition_to(*next));
            assert_eq!(has_transition, !from.is_terminal(), "{from}");
        }
    }

    #[test]
    fn names_round_trip() {
        for &state in RequestState::ALL {
            assert_eq!(state.as_str().parse::<RequestState>().unwrap(), state);
        }
        let names: Vec<_> = RequestState::ALL.iter().map(|state| state.as_str()).collect();
        assert_eq!(names.join(" "), "QUEUED RUNNING SUCCEEDED FAILED CANCELLED");
        assert!("DONE".parse::<RequestState>().is_err());
    }
}
