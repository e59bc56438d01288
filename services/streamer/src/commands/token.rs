//! Command `streamer token`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use streamer_auth::{DevKey, NewToken};
use streamer_core::{Clock, SystemClock};

use crate::{Exit, arguments::parse_duration};

/// Arguments of `streamer token`.
#[derive(Args, Clone, Debug)]
pub(crate) struct TokenArguments {
    /// Value of the claim `sub`.
    #[arg(long, default_value = "dev")]
    pub(crate) user: String,
    /// Value of the claim `tenant_id`.
    #[arg(long, default_value = "dev")]
    pub(crate) tenant: String,
    /// Permissions in the claim `permissions`, separated by commas; `*` for all.
    #[arg(long, default_value = "", value_delimiter = ',')]
    pub(crate) permissions: Vec<String>,
    /// Lifetime of the token: a number followed by s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = parse_duration)]
    pub(crate) expires: Duration,
    /// Data folder of the development key, which is created if it does not exist.
    #[arg(long, env = "STREAMER_DATA", default_value = "./streamer-data", value_name = "DIR")]
    pub(crate) data: PathBuf,
}

pub(crate) fn print(arguments: &TokenArguments) -> anyhow::Result<Exit> {
    let key = DevKey::load_or_create(&arguments.data)?;
    let permissions = arguments.permissions.iter().filter(|name| !name.is_empty()).cloned();
    let token = NewToken {
        user: arguments.user.clone(),
        tenant: arguments.tenant.clone(),
        permissions: permissions.collect(),
        expires_in: arguments.expires,
    };
    println!("{}", key.sign(&token, SystemClock.now())?);
    Ok(Exit::Done)
}
