//! The first message of a worker's stream: who it is, and what it offers.

use streamer_auth::{Caller, Principal};
use streamer_core::{ActionSpec, ErrorCode, Violations, validate};
use streamer_proto::{common::v1::Action, processor::v1::Hello};
use streamer_rpc::{action_from_proto, validation_status};
use streamer_store::{AssignedWorker, Owner};
use tonic::Status;

use crate::{
    actions::Actions,
    grants::Grants,
    session_secret::{SECRET_BYTES, SessionSecret},
    worker::Worker,
    worker_service::{MAX_SLOTS, broken, refusal},
};

/// Actions of one worker at most.
const MAX_ACTIONS: usize = 1000;
/// Those, each for every tenant that the token names, at most.
const MAX_DECLARED: usize = 10_000;
/// Longest text with which a worker describes itself, in bytes.
const MAX_TEXT_BYTES: usize = 128;
/// Shown in place of a worker that gives itself no name to be shown.
const UNNAMED: &str = "worker";

/// The worker that this introduces, if it may come in. The schemas that it declares are checked after
/// that, since that takes longer.
pub(crate) fn introduce(
    hello: &Hello,
    secret: &SessionSecret,
    caller: &Caller,
    offered: &Actions,
) -> Result<Worker, Status> {
    let mut violations = Violations::default();
    violations.check("hello.worker_id", validate::worker_id(&hello.worker_id));
    let texts =
        [("version", &hello.version), ("sdk", &hello.sdk), ("display_name", &hello.display_name)];
    for (name, text) in texts {
        let outcome = validate::at_most(text.len(), MAX_TEXT_BYTES, name);
        violations.check(&format!("hello.{name}"), outcome);
    }
    let slots = i64::from(hello.slots);
    violations.check("hello.slots", validate::in_range(slots, 0, MAX_SLOTS, ""));
    let specs = declared(&hello.actions, offered, &mut violations);
    if !violations.is_empty() {
        return Err(validation_status(&violations));
    }
    let grants = Grants::of(&caller.principal);
    for spec in &specs {
        if !grants.names(&spec.name) {
            return Err(refusal(
                ErrorCode::Forbidden,
                format!("permission worker:{} is needed", spec.name),
            ));
        }
    }
    let slots = u32::try_from(hello.slots).unwrap_or(0);
    let Principal { tenant, user, .. } = &*caller.principal;
    let principal = Owner { tenant: tenant.clone(), user: user.clone() };
    let assigned = AssignedWorker {
        identity: secret.identity(&principal),
        display_name: match hello.display_name.as_str() {
            "" => UNNAMED.to_owned(),
            name => name.to_owned(),
        },
    };
    let worker = Worker::new(hello.worker_id.clone(), principal, assigned, specs, grants, slots);
    let declared = worker.declared().len();
    if declared > MAX_DECLARED {
        let rule = format!(
            "must be at most {MAX_DECLARED} counting each for every tenant that the token is \
             for, are {declared}"
        );
        return Err(broken("hello.actions", &rule));
    }
    Ok(worker)
}

fn declared(actions: &[Action], offered: &Actions, violations: &mut Violations) -> Vec<ActionSpec> {
    if actions.is_empty() || actions.len() > MAX_ACTIONS {
        let rule = format!("must have 1 to {MAX_ACTIONS} entries, has {}", actions.len());
        violations.push("hello.actions", rule);
    }
    let mut specs: Vec<ActionSpec> = Vec::new();
    for (index, action) in actions.iter().take(MAX_ACTIONS).enumerate() {
        let field = format!("hello.actions[{index}]");
        let spec = action_from_proto(action, &field, violations);
        if offered.is_local(&spec.name) {
            let rule = format!("{:?} is run by the processor itself", spec.name);
            violations.push(format!("{field}.name"), rule);
        }
        if specs.iter().any(|earlier| earlier.name == spec.name) {
            violations.push(format!("{field}.name"), "is declared twice");
        }
        specs.push(spec);
    }
    specs
}

/// The secret that it repeats, or a new one on its first stream.
pub(crate) fn secret_of(hello: &Hello) -> Result<SessionSecret, Status> {
    if hello.session_secret.is_empty() {
        return SessionSecret::generate().map_err(|error| {
            tracing::error!(%error, "no random bytes for a worker's secret");
            refusal(ErrorCode::InternalError, "the processor has no random bytes".into())
        });
    }
    SessionSecret::repeated(&hello.session_secret).ok_or_else(|| {
        let length = hello.session_secret.len();
        broken("hello.session_secret", &format!("must have {SECRET_BYTES} bytes, has {length}"))
    })
}
