//! `streamer actions`: lists the available actions.

use serde_json::{Value, json};
use streamer_proto::router::v1::ListActionsRequest;

use crate::{Exit, arguments::CommonArguments, terminal::print_line};

pub(crate) async fn list(common: CommonArguments) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let call = api.call(ListActionsRequest {});
    let response = api.router().list_actions(call).await.map_err(|status| api.error(&status))?;
    for action in response.into_inner().actions {
        if common.prints_json() {
            let schema: Value = serde_json::from_str(&action.payload_schema).unwrap_or(Value::Null);
            let line = json!({
                "name": action.name, "description": action.description, "sync": action.sync,
                "estimated_duration_ms": action.estimated_duration_ms,
                "max_attempts": action.max_attempts, "permission": action.permission,
                "workers": action.workers, "available": action.available,
                "payload_schema": schema,
            });
            print_line(line)?;
        } else {
            let kind = if action.sync { "sync" } else { "async" };
            let runs_on = match (action.available, action.workers) {
                (false, _) => "unavailable".to_owned(),
                (true, 0) => "server".to_owned(),
                (true, workers) => format!("{workers} worker(s)"),
            };
            print_line(format_args!(
                "{:<20}  {kind:<5}  {runs_on:<12}  {}",
                action.name, action.description
            ))?;
        }
    }
    Ok(Exit::Done)
}
