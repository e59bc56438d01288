//! Validation of `hello`, the first message of a worker's stream.

use streamer_auth::{Caller, Principal};
use streamer_core::{ActionSpec, ErrorCode, Violations, validate};
use streamer_proto::{common::v1::Action, processor::v1::Hello};
use streamer_rpc::{action_from_proto, error_status, validation_status, violation_status};
use streamer_store::{AssignedWorker, Owner};
use tonic::Status;

use crate::{
    actions::Actions,
    workers::{
        grants::Grants,
        session_secret::{SECRET_BYTES, SessionSecret},
        worker_session::{MAX_SLOTS, WorkerSession},
    },
};

/// Maximum number of actions of one worker.
const MAX_ACTIONS: usize = 1000;
/// Maximum number of declarations of one worker: one per action and tenant that its token names.
const MAX_DECLARATIONS: usize = 10_000;
/// Maximum length of each text that describes the worker, in bytes.
const MAX_TEXT_BYTES: usize = 128;
/// Display name of a worker that does not send one.
const DEFAULT_DISPLAY_NAME: &str = "worker";

/// Validates `hello` and returns the session of the worker. The declared schemas are validated afterwards, because that
/// takes longer.
pub(crate) fn validate_hello(
    hello: &Hello,
    secret: &SessionSecret,
    caller: &Caller,
    offered: &Actions,
) -> Result<WorkerSession, Status> {
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
    let specs = parse_actions(&hello.actions, offered, &mut violations);
    if !violations.is_empty() {
        return Err(validation_status(&violations));
    }
    let grants = Grants::from_principal(&caller.principal);
    for spec in &specs {
        if !grants.allows_any_tenant(&spec.name) {
            return Err(error_status(
                ErrorCode::Forbidden,
                format!("permission worker:{} is required", spec.name),
            ));
        }
    }
    let slots = hello.slots.unsigned_abs();
    let Principal { tenant, user, .. } = &*caller.principal;
    let principal = Owner { tenant: tenant.clone(), user: user.clone() };
    let assigned = AssignedWorker {
        identity: secret.identity(&principal),
        display_name: match hello.display_name.as_str() {
            "" => DEFAULT_DISPLAY_NAME.to_owned(),
            name => name.to_owned(),
        },
    };
    let worker =
        WorkerSession::new(hello.worker_id.clone(), principal, assigned, specs, grants, slots);
    let declared = worker.declarations().len();
    if declared > MAX_DECLARATIONS {
        let rule = format!(
            "must have at most {MAX_DECLARATIONS} entries, each counted once for every tenant that the \
             token names, has {declared}"
        );
        return Err(violation_status("hello.actions", &rule));
    }
    Ok(worker)
}

fn parse_actions(
    actions: &[Action],
    offered: &Actions,
    violations: &mut Violations,
) -> Vec<ActionSpec> {
    if actions.is_empty() || actions.len() > MAX_ACTIONS {
        let rule = format!("must have 1 to {MAX_ACTIONS} entries, has {}", actions.len());
        violations.push("hello.actions", rule);
    }
    let mut specs: Vec<ActionSpec> = Vec::new();
    for (index, action) in actions.iter().take(MAX_ACTIONS).enumerate() {
        let field = format!("hello.actions[{index}]");
        let spec = action_from_proto(action, &field, violations);
        if offered.is_local(&spec.name) {
            let rule = format!("{:?} is a built-in action of the processor", spec.name);
            violations.push(format!("{field}.name"), rule);
        }
        if specs.iter().any(|earlier| earlier.name == spec.name) {
            violations.push(format!("{field}.name"), "is declared twice");
        }
        specs.push(spec);
    }
    specs
}

/// Returns the session secret from `hello`, or a new one on the first stream of the worker.
pub(crate) fn session_secret(hello: &Hello) -> Result<SessionSecret, Status> {
    if hello.session_secret.is_empty() {
        return SessionSecret::generate().map_err(|error| {
            tracing::error!(%error, "failed to generate a session secret");
            error_status(ErrorCode::InternalError, "the processor cannot generate random bytes")
        });
    }
    SessionSecret::from_bytes(&hello.session_secret).ok_or_else(|| {
        let length = hello.session_secret.len();
        violation_status(
            "hello.session_secret",
            &format!("must have {SECRET_BYTES} bytes, has {length}"),
        )
    })
}
