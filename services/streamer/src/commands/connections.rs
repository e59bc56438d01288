//! `streamer connections`: lists, messages and closes live WebSocket connections.

use clap::{Args, Subcommand};
use serde_json::json;
use streamer_core::Timestamp;
use streamer_proto::{
    common::v1::{Payload, payload::Body},
    connections::v1::{
        BroadcastRequest, DisconnectRequest, ListRequest, SendRequest, send_request::Target,
    },
    millis,
};

use crate::{Exit, arguments::CommonArguments, terminal::print_line};

/// Arguments of `streamer connections`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ConnectionsArguments {
    /// The command to run.
    #[command(subcommand)]
    pub(crate) command: ConnectionsCommand,
}

/// Commands for connections.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ConnectionsCommand {
    /// List the tenant's connections.
    List {
        /// List only the connections of the given user.
        #[arg(long, default_value = "")]
        user: String,
        #[command(flatten)]
        common: CommonArguments,
    },
    /// Send a message to all connections of a user, or to one connection.
    Send {
        /// Topic of the message.
        topic: String,
        /// Message, as JSON.
        #[arg(id = "message")]
        data: String,
        /// User to send the message to.
        #[arg(long, required_unless_present = "connection", conflicts_with = "connection")]
        user: Option<String>,
        /// ID of the connection to send the message to.
        #[arg(long)]
        connection: Option<String>,
        #[command(flatten)]
        common: CommonArguments,
    },
    /// Send a message to all connections of the tenant.
    Broadcast {
        /// Topic of the message.
        topic: String,
        /// Message, as JSON.
        #[arg(id = "message")]
        data: String,
        #[command(flatten)]
        common: CommonArguments,
    },
    /// Close a connection.
    Disconnect {
        /// ID of the connection.
        connection: String,
        /// Reason to send to the client.
        #[arg(long, default_value = "")]
        reason: String,
        #[command(flatten)]
        common: CommonArguments,
    },
}

pub(crate) async fn run(arguments: ConnectionsArguments) -> anyhow::Result<Exit> {
    match arguments.command {
        ConnectionsCommand::List { user, common } => list_connections(&common, user).await,
        ConnectionsCommand::Send { topic, data, user, connection, common } => {
            let target = user.map(Target::UserId).or(connection.map(Target::ConnectionId));
            let api = common.api().await?;
            let call = api.call(SendRequest { target, topic, data: Some(payload(data)) });
            let sent = api.connections().send(call).await.map_err(|status| api.error(&status))?;
            print_line(json!({ "recipients": sent.into_inner().recipients }))?;
            Ok(Exit::Done)
        }
        ConnectionsCommand::Broadcast { topic, data, common } => {
            let api = common.api().await?;
            let call = api.call(BroadcastRequest { topic, data: Some(payload(data)) });
            let sent =
                api.connections().broadcast(call).await.map_err(|status| api.error(&status))?;
            print_line(json!({ "recipients": sent.into_inner().recipients }))?;
            Ok(Exit::Done)
        }
        ConnectionsCommand::Disconnect { connection, reason, common } => {
            let api = common.api().await?;
            let call = api.call(DisconnectRequest { connection_id: connection, reason });
            api.connections().disconnect(call).await.map_err(|status| api.error(&status))?;
            Ok(Exit::Done)
        }
    }
}

async fn list_connections(common: &CommonArguments, user_id: String) -> anyhow::Result<Exit> {
    let api = common.api().await?;
    let mut page_token = String::new();
    loop {
        let call = api.call(ListRequest { user_id: user_id.clone(), page_size: 1000, page_token });
        let listed = api.connections().list(call).await.map_err(|status| api.error(&status))?;
        let page = listed.into_inner();
        for connection in page.connections {
            let since = connection.connect_time.as_ref().map_or(0, millis);
            let line = json!({
                "connection_id": connection.connection_id, "user_id": connection.user_id,
                "tenant_id": connection.tenant_id, "gateway": connection.gateway,
                "remote_address": connection.remote_address, "user_agent": connection.user_agent,
                "connect_time": Timestamp::from_millis(since).to_string(),
            });
            print_line(line)?;
        }
        if page.next_page_token.is_empty() {
            return Ok(Exit::Done);
        }
        page_token = page.next_page_token;
    }
}

fn payload(json: String) -> Payload {
    Payload { content_type: String::new(), body: Some(Body::Data(json.into())) }
}
